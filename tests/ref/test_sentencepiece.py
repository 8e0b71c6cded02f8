"""Bare sentencepiece files and the tokenizer_config.json beside them.

Two witnesses: the sentencepiece library for what stands between special tokens, and transformers for what these are.
transformers' class LlamaTokenizer knows no normaliser, and adds no space where a text starts with one: there it is
compared on texts for which that is no difference.
"""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from llama_ref.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_ref.tokenizers.tokenizer import load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

CORPUS = [
    "Hello my name is over there",
    "the quick brown fox over the lazy dog",
    "over here he is",
    "naïve ﬁne ① Ａ",
] * 40
PLAIN = (
    "over there",
    "  over  there ",
    " over",
    "Hello ﬁne ① Ａ",
    "é漢 over",
    "e\N{COMBINING ACUTE ACCENT}",
    "\tover\n\nthe",
)
PLAIN += ("", " ", "▁over", "HELLO", "a\N{NO-BREAK SPACE}b\N{ZERO WIDTH SPACE}c", "🙂\N{ZERO WIDTH JOINER}🙂")
MIXED = (
    "</s>over",
    "over</s> the</s>Ａ",
    "<unk>a",
    "over<s><s> there",
    "x <|im_end|> over<|im_end|>",
    "<|im_end|>  over",
)
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END = {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}


def train(directory: Path, **settings: Any) -> Any:
    """Train a model of a few hundred pieces, write it as tokenizer.model, and return sentencepiece's own reader of it."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        hard_vocab_limit=False,
        minloglevel=2,
        **({"model_type": "bpe", "vocab_size": 340} | settings),
    )
    (directory / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def beside(directory: Path, model_type: str = "llama", **settings: Any) -> tuple[SentencePieceTokenizer, Any]:
    """Write tokenizer_config.json; our tokenizer of the directory, and transformers'."""
    from transformers import AutoTokenizer

    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer_config.json").write_text(json.dumps(NAMED | settings))
    ours = load_tokenizer(directory)
    assert isinstance(ours, SentencePieceTokenizer)
    return ours, AutoTokenizer.from_pretrained(directory)


def assert_same_texts(ours: Tokenizer, theirs: Any, ids: list[int]) -> None:
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), ids


SWITCHES = ("byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces")


@pytest.mark.parametrize("on", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf", "custom"])
def test_every_normaliser_is_followed(tmp_path: Path, rule: str, model_type: str, on: tuple[bool, ...]) -> None:
    settings = {"model_type": model_type, **dict(zip(SWITCHES, on, strict=True))}
    named: dict[str, Any] = {"normalization_rule_name": rule}
    if rule == "custom":
        (tmp_path / "rules.tsv").write_text("41\t61\n48 45\t62\n")  # A -> a, HE -> b
        named = {"normalization_rule_tsv": str(tmp_path / "rules.tsv")}
    model = train(tmp_path, **named, **settings)
    ours, theirs = beside(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    for text in PLAIN:
        assert ours.encode(text, bos=False) == model.encode(text), text
    for text in PLAIN + MIXED:
        ids = ours.encode(text, bos=False)
        if (rule, text) != ("custom", "HELLO"):  # transformers misses rules for several characters
            assert ids == theirs.encode(text, add_special_tokens=False), text
        assert_same_texts(ours, theirs, ids)


def test_spaces_that_stay_spaces_are_sentencepieces_own(tmp_path: Path) -> None:
    """normalizer_spec.escape_whitespaces = false: field 5 of field 3. transformers marks spaces all the same."""
    import sentencepiece

    train(tmp_path, **LLAMA)
    content = (tmp_path / "tokenizer.model").read_bytes() + b"\x1a\x02\x28\x00"
    (tmp_path / "tokenizer.model").write_bytes(content)
    model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = load_tokenizer(tmp_path)
    for text in PLAIN:
        assert ours.encode(text, bos=False) == model.encode(text), text
        if "▁" not in text:
            assert ours.decode(model.encode(text)) == text


def test_symbols_that_a_model_was_trained_with_are_one_id(tmp_path: Path) -> None:
    model = train(tmp_path, **LLAMA, user_defined_symbols=["<usr>", "<|im_end|>"], control_symbols=["<sep>"])
    ours, theirs = beside(tmp_path)
    for text in (*PLAIN, *MIXED, "<sep>over <usr>there", "<usr> <sep> over"):
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert_same_texts(ours, theirs, ids)
    assert ours.decode(model.piece_to_id(["<sep>", "<usr>"])) == "<usr>"


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"])
def test_leading_spaces_follow_the_settings(
    tmp_path: Path, kind: str, prefix: bool | None, legacy: bool | None
) -> None:
    train(tmp_path, **LLAMA)
    stated = {} if legacy is None else {"legacy": legacy}
    ours, theirs = beside(tmp_path, tokenizer_class=kind, add_prefix_space=prefix, **stated)
    for text in (
        "over",
        "over there",
        "é漢 over",
        "</s>over",
        "over</s>there",
        "<s>over</s>there</s></s>x",
        "x</s>",
        "",
    ):
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        if kind != "CodeLlamaTokenizer":  # its decoder takes a leading space off that its encoder did not add
            assert_same_texts(ours, theirs, ids)


def test_add_prefix_space_counts_over_the_models_own_rule(tmp_path: Path) -> None:
    model = train(tmp_path, **LLAMA, add_dummy_prefix=False)
    ours, theirs = beside(tmp_path, tokenizer_class="LlamaTokenizer", add_prefix_space=True)
    assert ours.encode("over", bos=False) == theirs.encode("over", add_special_tokens=False) != model.encode("over")
    assert ours.decode(ours.encode("over")) == "over"
    silent, _ = beside(tmp_path, tokenizer_class="LlamaTokenizer")
    assert silent.encode("over", bos=False) == model.encode("over")
    assert silent.decode(model.encode(" over")) == " over"


def test_without_a_class_every_stretch_gets_its_space_and_with_llamas_the_first(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    for model_type, kind, every in (
        ("llama", None, True),
        ("llama", "LlamaTokenizer", False),
        ("mistral", "LlamaTokenizer", True),
        ("mistral", None, True),
    ):
        ours, theirs = beside(tmp_path, model_type, **({} if kind is None else {"tokenizer_class": kind}))
        ids = ours.encode("over</s>over", bos=False)
        assert ids == theirs.encode("over</s>over", add_special_tokens=False)
        assert (ids[0] == ids[-1]) == every
        (tmp_path / model_type).mkdir(exist_ok=True)
        ours.save(tmp_path / model_type)  # without the config.json that decided
        assert load_tokenizer(tmp_path / model_type).encode("over</s>over", bos=False) == ids


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({"eos_token": "<|im_end|>", "added_tokens_decoder": {"340": END}}, (340,)),
        ({"eos_token": "<|im_end|>"}, (340,)),
        ({"eos_token": {"__type": "AddedToken"} | END}, (340,)),
        ({"eos_token": "<|im_end|>", "pad_token": "<pad>"}, (340,)),
        ({"pad_token": "<pad>", "extra_special_tokens": ["<|im_end|>"]}, (2,)),
        ({"eos_token": "over"}, None),
        ({"eos_token": None}, ()),
        ({"bos_token": None}, (2,)),
        ({"unk_token": None}, (2,)),
    ],
)
def test_special_tokens_are_those_that_are_named(tmp_path: Path, settings: dict[str, Any], ends: Any) -> None:
    model = train(tmp_path, **LLAMA)
    size = model.vocab_size()
    settings = json.loads(json.dumps(settings).replace('"340"', f'"{size}"'))
    ours, theirs = beside(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **settings)
    stated = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
    assert ours.eos_ids == stated
    assert ends is None or ours.eos_ids == tuple(size if token == 340 else token for token in ends)
    assert (ours.bos_id, ours.vocab_size) == (theirs.bos_token_id, len(theirs))
    if None not in settings.values() and "extra_special_tokens" not in settings:
        assert ours.special_tokens == theirs.special_tokens_map
    for text in ("x<|im_end|> the", "<|im_end|><|im_end|>", "<pad>", "quick over"):
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert_same_texts(ours, theirs, ids)


def test_listed_tokens_have_the_ids_that_are_listed(tmp_path: Path) -> None:
    """transformers counts on from the last piece instead, and so misses the rows that the model was trained with."""
    model = train(tmp_path, **LLAMA)
    ours, _ = beside(tmp_path, eos_token="<|im_end|>", added_tokens_decoder={str(model.vocab_size() + 5): END})
    assert ours.eos_ids == (model.vocab_size() + 5,)
    assert ours.vocab_size == model.vocab_size() + 6
    assert ours.encode("<|im_end|>", bos=False) == list(ours.eos_ids)


def test_a_listed_token_renames_the_piece_of_its_id(tmp_path: Path) -> None:
    model = train(tmp_path, **LLAMA)
    listed = {str(i): END | {"content": text} for i, text in ((0, "<unk>"), (1, "<|begin|>"), (2, "<|im_end|>"))}
    names = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    ours, theirs = beside(tmp_path, added_tokens_decoder=listed, tokenizer_class="PreTrainedTokenizerFast", **names)
    assert (ours.bos_id, ours.eos_ids) == (1, (2,)) == (theirs.bos_token_id, (theirs.eos_token_id,))
    ids = ours.encode("<|begin|>over<|im_end|>", bos=False)
    assert ids == theirs.encode("<|begin|>over<|im_end|>", add_special_tokens=False)
    assert_same_texts(ours, theirs, ids)
    assert ours.vocab_size == model.vocab_size()  # transformers gives the old names new ids
    assert 1 not in ours.encode("over<s>x", bos=False)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("special", [True, False])
def test_flags_of_added_tokens_count(tmp_path: Path, flag: str, special: bool) -> None:
    model = train(tmp_path, **LLAMA)
    token = END | {flag: True, "special": special}
    listed = {str(model.vocab_size()): token, str(model.vocab_size() + 1): END | {"content": "<|im_end|>x"}}
    ours, theirs = beside(tmp_path, added_tokens_decoder=listed, tokenizer_class="PreTrainedTokenizerFast")
    for text in (
        "x <|im_end|> over",
        "x<|im_end|>over",
        "<|im_end|>",
        " <|im_end|>\n\n<|im_end|> ",
        "a <|im_end|>x",
        "é<|im_end|>",
    ):
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert_same_texts(ours, theirs, ids)


def test_bos_leads_unless_the_settings_say_that_it_does_not(tmp_path: Path) -> None:
    """transformers 5.24 adds none where nothing is stated, though its LlamaTokenizer's documentation says that it does."""
    train(tmp_path, **LLAMA)
    for stated in (True, False):
        ours, theirs = beside(tmp_path, add_bos_token=stated)
        assert ours.encode("over") == theirs.encode("over")
        assert (ours.encode("over")[0] == 1) == stated
    ours, _ = beside(tmp_path)
    assert ours.encode("over")[0] == 1
    ours, _ = beside(tmp_path, bos_token=None)
    assert ours.encode("over")[0] != 1


def test_eos_is_never_put_behind_a_text_and_that_is_said(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    with pytest.warns(UserWarning, match=r"/tokenizer_config\.json: add_eos_token is not followed"):
        ours, _ = beside(tmp_path, add_eos_token=True)
    assert ours.encode("over")[-1] != 2


def test_bytes_that_are_no_utf8_give_the_same_text_as_in_a_tokenizer_json(tmp_path: Path) -> None:
    """Of a run of byte tokens that is no UTF-8 every byte becomes a replacement character."""
    model = train(tmp_path, **LLAMA)
    ours, theirs = beside(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path / "json").mkdir()
    theirs.save_pretrained(tmp_path / "json")
    same = load_tokenizer(tmp_path / "json")
    assert isinstance(same, JsonTokenizer)
    byte = [model.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    word = model.encode("over")
    runs: list[list[int]] = [
        [byte[0xE2], byte[0x82]],  # the first two of three bytes
        [byte[0x41], byte[0xFF], byte[0x42]],  # between two good ones
        [byte[0x82], *word, byte[0xC3]],
        [*word, byte[0xC3], 2, byte[0xA9]],  # a special token between, shown or not
        [byte[0xC3], 99999, byte[0xA9]],  # an id without text
        [byte[0xF0], byte[0x9F], byte[0x99], *word],
        [byte[0x20], byte[0x41]],
        [2, byte[0x20], byte[0xFF]],
    ]
    for ids in runs:
        assert_same_texts(ours, theirs, ids)
        for skip in (True, False):
            assert ours.decode(ids, skip) == same.decode(ids, skip), ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 3}, r"tokenizer_config\.json: eos_token=3 is neither text nor"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": []},
            r"tokenizer_config\.json: added_tokens_decoder is no object",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": END}}, "holds 'x', which is no token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": "<a>"}}, "holds '7', which is no token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 12: END}}, "'<|im_end|>' has the id 999999999999"),
        ("tokenizer_config.json", {"extra_special_tokens": "<a>"}, "extra_special_tokens='<a>' is not a list"),
        ("tokenizer_config.json", {"additional_special_tokens": [7]}, "extra_special_tokens=7 is neither text"),
        ("special_tokens_map.json", {"bos_token": ["<s>"]}, "bos_token=.* is neither text"),
        ("added_tokens.json", {"<a>": "7"}, r"added_tokens\.json: an added token must have text and an id"),
        ("added_tokens.json", {"<a>": -7}, "the added token '<a>' has the id -7"),
        ("special_tokens_map.json", [], r"special_tokens_map\.json: holds no JSON object"),
    ],
)
def test_a_companion_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, file: str, content: Any, message: str
) -> None:
    train(tmp_path, **LLAMA)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=message.replace("|", r"\|")) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_not_encoded(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    with pytest.raises(ValueError, match=r"^the text holds bytes that are not UTF-8$"):
        load_tokenizer(tmp_path).encode("ab" + b"\xff".decode("utf-8", "surrogateescape"))
