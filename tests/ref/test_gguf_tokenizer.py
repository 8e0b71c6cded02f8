"""Vocabularies of GGUF files. The witnesses: the `tokenizers` library on the same merges with the cut that a model was
published with, sentencepiece on the model that a vocabulary came from, and for what only llama.cpp decides (cuts by name,
ends of turns, defaults) answers of llama.cpp itself (October 2026), recorded in gguf_cuts.json and in the tables here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_ref.checkpoint import open_checkpoint
from llama_ref.convert import convert
from llama_ref.formats.gguf_header import read_header
from llama_ref.formats.gguf_vocabulary import end_ids
from llama_ref.models import Model
from llama_ref.tokenizers.gguf_byte_pair import pretokenizer_of
from llama_ref.tokenizers.gguf_pretokenizers import PRETOKENIZERS
from llama_ref.tokenizers.gguf_tokenizer import files_of_gguf, settings_of
from llama_ref.tokenizers.tokenizer import load_tokenizer
from llama_ref.tokenizers.tokenizer_files import JSON_FILE, TokenizerError
from tests.ref.gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    byte_pair,
    pieces,
    sentencepiece_bytes,
    with_tokens,
    write_gguf,
)

RECORDED = json.loads(Path(__file__).with_name("gguf_cuts.json").read_text(encoding="utf-8"))
PRE = "tokenizer.ggml.pre"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words() -> dict[str, Any]:
    return byte_pair()


@pytest.fixture(scope="module")
def model() -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=sentencepiece_bytes())


def made(path: Path, metadata: dict[str, Any]) -> Any:
    """The tokenizer of a file with this metadata and no tensors."""
    return load_tokenizer(write_gguf(path / "m.gguf", metadata, tensors={}))


def refused(path: Path, metadata: dict[str, Any], *fragments: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        made(path, metadata)
    assert "\n" not in str(caught.value)
    for fragment in ("m.gguf: its tokenizer could not be converted", *fragments):
        assert fragment in str(caught.value)


# --- the cut of a byte-pair vocabulary ------------------------------------------------------------


@pytest.mark.parametrize("name", list(RECORDED["cuts"]))
def test_a_name_cuts_as_llama_cpp_does(name: str, words: dict[str, Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = write_gguf(tmp_path / "m.gguf", words | {PRE: name}, tensors={})
    backend: Any = Tokenizer.from_str(files_of_gguf(path)[JSON_FILE].decode())
    for text, cut in zip(RECORDED["texts"], RECORDED["cuts"][name], strict=True):
        found = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert "¦".join(found) == cut


def test_every_name_has_a_recorded_cut_and_a_working_expression(words: dict[str, Any], tmp_path: Path) -> None:
    recorded = {PRETOKENIZERS[name] for name in RECORDED["cuts"]}
    assert set(PRETOKENIZERS.values()) == recorded
    assert len(PRETOKENIZERS) >= 75
    text = "Hello, 12345 words\n  it's été"
    for index, name in enumerate(PRETOKENIZERS):
        (tmp_path / str(index)).mkdir()
        tokenizer = made(tmp_path / str(index), words | {PRE: name})
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["no-such-name", "", "gemma4", "kimi-k2", "Llama-BPE", "whitespace"])
def test_an_unknown_name_is_refused_and_a_missing_one_is_said(name: str, words: dict[str, Any], tmp_path: Path) -> None:
    if name:
        refused(tmp_path, words | {PRE: name}, f"{PRE}={name!r} is not supported")
        return
    text = "a 1234567 it's"
    named = tmp_path / "named"
    named.mkdir()
    wanted = made(named, words | {PRE: "default"}).encode(text)
    for metadata in (words | {PRE: None}, words | {PRE: ""}):
        with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is missing"):
            assert made(tmp_path, metadata).encode(text) == wanted


def test_kinds_of_tokens_that_are_missing_are_said(words: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"tokenizer\.ggml\.token_type is missing: only tokens that are known by their"
    ):
        tokenizer = made(tmp_path, words | {"tokenizer.ggml.token_type": None})
    assert len(tokenizer.encode("</s>", bos=False)) == 1  # by its text
    assert len(tokenizer.encode("<s>", bos=False)) > 1


def test_a_warning_comes_from_the_cache_too(words: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="pre is missing"):
            made(tmp_path, words | {PRE: None})


def test_ids_are_those_of_the_published_rule(words: dict[str, Any], tmp_path: Path) -> None:
    """SmolLM2's and StarCoder's: digits one by one, then GPT-2's words; GPT-2's own; Qwen2's as transformers has it."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    level: Any = pre_tokenizers.ByteLevel
    split: Any = pre_tokenizers.Split
    digits: Any = pre_tokenizers.Digits(individual_digits=True)
    rules = {
        "smollm": [digits, level(add_prefix_space=False, use_regex=True)],
        "starcoder": [digits, level(add_prefix_space=False, use_regex=True)],
        "gpt-2": [level(add_prefix_space=False, use_regex=True)],
        "qwen2": [
            split(Regex(PRETOKENIZE_REGEX), "isolated", False),
            level(add_prefix_space=False, use_regex=False),
        ],
    }
    for name, rule in rules.items():
        path = write_gguf(tmp_path / f"{name}.gguf", words | {PRE: name}, tensors={})
        backend: Any = Tokenizer.from_str(files_of_gguf(path)[JSON_FILE].decode())
        backend.pre_tokenizer = pre_tokenizers.Sequence(rule)
        ours = load_tokenizer(path)
        for text in (
            *RECORDED["texts"],
            "year 2024",
            "2²³ x³ ½ ①",
            "x=1;y=22;",
            "a;\n\n  c",
            "hello  world",
            " it's\t\n",
        ):
            assert ours.encode(text, bos=False) == backend.encode(text, add_special_tokens=False).ids


def test_the_default_model_cuts_digits_as_smollm2_was_published(default_model: Model) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    assert default_model.path is not None
    told = read_header(default_model.path).metadata
    assert told[PRE] == "smollm"
    merges = [tuple(merge.split(" ")) for merge in told["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(told["tokenizer.ggml.tokens"])}
    published: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits: Any = pre_tokenizers.Digits(individual_digits=True)
    level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    published.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    published.decoder = decoders.ByteLevel()
    ours = default_model.tokenizer()
    texts = ["2²³", "x³ + y²", "½ cup", "①②", "١٢٣ ٤", "year 2024, 1,234.56", "１２３", "Ⅳ 12", "𑷠"]
    for text in (*RECORDED["texts"], *texts):
        assert ours.encode(text) == published.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_tekkens_expression_is_the_one_that_mistral_ships() -> None:
    from tests.ref.test_tokenizer_witness import real_file

    shipped = json.loads(real_file("mistral_common", "data/tekken_240911.json").read_text(encoding="utf-8"))
    assert pretokenizer_of({PRE: "tekken"}).expressions == (shipped["config"]["pattern"],)


@pytest.mark.parametrize("whole", [True, False])
def test_whole_words_need_no_merges_where_the_name_says_so(whole: bool, words: dict[str, Any], tmp_path: Path) -> None:
    metadata = with_tokens(words, {"Ġzzz": NORMAL})
    name = "llama-bpe" if whole else "dbrx"  # the same expression
    ids = made(tmp_path, metadata | {PRE: name}).encode(" zzz", bos=False)
    assert (ids == [len(metadata["tokenizer.ggml.tokens"]) - 1]) is whole


LEADS = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken", "chameleon"), True
    ),
    **dict.fromkeys(
        ("default", "smollm", "gpt-2", "smaug-bpe", "dbrx", "qwen2", "deepseek-llm", "glm4", "viking"), False
    ),
}


@pytest.mark.parametrize("name", list(LEADS))
@pytest.mark.parametrize("stated", [None, True, False])
def test_bos_leads_by_the_name_unless_the_file_says_otherwise(
    name: str, stated: bool | None, words: dict[str, Any], tmp_path: Path
) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    metadata = words | {PRE: name, "tokenizer.ggml.add_bos_token": stated} | ids
    tokenizer = made(tmp_path, metadata)
    leads = LEADS[name] if stated is None else stated
    assert (tokenizer.encode("year")[0] == 0) is leads
    assert tokenizer.encode("year", bos=False)[0] != 0
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("year 12") == tokenizer.encode("year 12")


# --- sentencepiece vocabularies -------------------------------------------------------------------

TEXTS = (
    "over there",
    "he  is\nover",
    " over",
    "   over",
    "over ",
    "aaaaa aaa",
    "    indented",
    "é漢🙂 over",
    "",
    " ",
    "\t",
)


def test_a_sentencepiece_vocabulary_gives_the_ids_of_the_model_that_it_came_from(model: Any, tmp_path: Path) -> None:
    tokenizer = made(tmp_path, pieces(model))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), model.vocab_size())
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *model.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("trained", "stated"),
    [
        ({"add_dummy_prefix": False}, {"tokenizer.ggml.add_space_prefix": False}),
        ({"remove_extra_whitespaces": True}, {"tokenizer.ggml.remove_extra_whitespaces": True}),
        ({"vocab_size": 300}, {}),
        ({"byte_fallback": False, "vocab_size": 60}, {}),
    ],
)
def test_what_a_file_says_of_spaces_holds(trained: dict[str, Any], stated: dict[str, Any], tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    other: Any = SentencePieceProcessor(model_proto=sentencepiece_bytes(**trained))
    tokenizer = made(tmp_path, pieces(other) | stated)
    for text in TEXTS:
        assert tokenizer.encode(text, bos=False) == other.encode(text)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_text_without_a_leading_space_keeps_none_and_one_with_it_keeps_it(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    other: Any = SentencePieceProcessor(model_proto=sentencepiece_bytes(add_dummy_prefix=False))
    tokenizer = made(tmp_path, pieces(other) | {"tokenizer.ggml.add_space_prefix": False})
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_map_of_characters_is_applied(tmp_path: Path) -> None:
    """A normaliser other than the identity: full-width letters and ligatures become plain ones."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    content = sentencepiece_bytes(normalization_rule_name="nmt_nfkc")
    other: Any = SentencePieceProcessor(model_proto=content)
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(content)
    charsmap = list(proto.normalizer_spec.precompiled_charsmap)
    tokenizer = made(tmp_path, pieces(other) | {"tokenizer.ggml.precompiled_charsmap": charsmap})
    for text in ("ｏｖｅｒ there", "ﬁ", "he\u00a0is", *TEXTS):
        assert tokenizer.encode(text, bos=False) == other.encode(text)


def test_special_tokens_are_found_first_and_a_space_follows_each(model: Any, tmp_path: Path) -> None:
    metadata = with_tokens(pieces(model), {"<|x|>": CONTROL, "<y>": USER_DEFINED, "<pad>": UNUSED})
    size = model.vocab_size()
    tokenizer = made(tmp_path, metadata)
    ids = tokenizer.encode("he<|x|>over<y>is</s>", bos=False)
    assert ids == [*model.encode("he"), size, *model.encode("over"), size + 1, *model.encode("is"), 2]
    assert tokenizer.decode(ids) == "he over<y> is"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "he<|x|> over<y> is</s>"
    assert tokenizer.encode("a<pad>", bos=False) == model.encode("a<pad>")
    assert tokenizer.encode("over") == [1, *model.encode("over")]


def test_without_scores_and_kinds_the_pieces_are_read_by_their_text(model: Any, tmp_path: Path) -> None:
    metadata = {n: v for n, v in pieces(model).items() if not n.endswith(("token_type", "scores"))}
    with pytest.warns(UserWarning) as told:
        tokenizer = made(tmp_path, metadata)
    assert [str(one.message).split()[0] for one in told] == ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"]
    assert all("is missing" in str(one.message) for one in told)
    assert tokenizer.decode(tokenizer.encode("漢 over")) == "漢 over"  # byte tokens, merges from the left
    roles = {f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "unknown")}
    (tmp_path / "bare").mkdir()
    bare = made(tmp_path / "bare", {name: value for name, value in pieces(model).items() if name not in roles})
    assert (bare.bos_id, bare.eos_ids, bare.encode("over")) == (1, (2,), [1, *model.encode("over")])


def test_a_sentencepiece_vocabulary_converts_to_a_directory(model: Any, tmp_path: Path) -> None:
    metadata = with_tokens(pieces(model), {"<|im_end|>": CONTROL, "<y>": USER_DEFINED})
    path = write_gguf(tmp_path / "m.gguf", metadata)
    ours = load_tokenizer(path)
    for to in ("hf", "meta"):
        convert(path, tmp_path / to, to)
        again = load_tokenizer(tmp_path / to)
        assert (again.bos_id, again.eos_ids) == (ours.bos_id, ours.eos_ids)
        for text in ("he<|im_end|>over", " over <y>there", *TEXTS):
            assert again.encode(text) == ours.encode(text)
    assert open_checkpoint(tmp_path / "hf").config == open_checkpoint(path).config


# --- ids with a role ------------------------------------------------------------------------------

ENDINGS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>"),
    *("[EOT]", "[EOS]", "<|eom_id|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<eos>", "<turn|>", "[e~["),
    *("<|return|>", "<|call|>", "<|flush|>", "<|fim_pad|>", "<|fim_repo|>", "<reponame>", "<|file_sep|>"),
)


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
@pytest.mark.parametrize("text", ENDINGS)
def test_a_token_that_ends_a_turn_is_known_by_its_text(
    text: str, kind: int, words: dict[str, Any], tmp_path: Path
) -> None:
    metadata = with_tokens(words, {"<|x|>": CONTROL, text: kind}) | {"tokenizer.ggml.eos_token_id": 1}
    path = write_gguf(tmp_path / "m.gguf", metadata)
    token = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert open_checkpoint(path).config.eos_ids == (1, token)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode(f"it{text}", bos=False)[-1] == token  # whatever its kind, found in a text and not shown
    assert tokenizer.decode(tokenizer.encode(f"it{text}")) == "it"


@pytest.mark.parametrize(
    ("tokens", "named", "ends"),
    [
        ("a </s> b", {}, (1,)),
        ("a </s> b", {"eos": 2}, (2, 1)),
        ("a b c d", {"eos": 3, "eot": 1, "eom": 2}, (3, 1, 2)),
        ("a b <PAD> [PAD]", {}, (2,)),
        ("a b <PAD> [PAD]", {"fim_pad": 1}, (1,)),
        ("a <|end|> <|return|> <|call|>", {}, (2, 3)),
        ("a <|end|> <|return|> c", {}, (2, 1)),
        ("a <|end|> <|flush|> <|calls|>", {"eos": 1}, (2, 3)),
        ("a </s> <|tool_response> <turn|>", {"eos": 3}, (3, 2)),
        ("a b c d", {}, ()),
    ],
)
def test_ends_are_those_of_llama_cpp(tokens: str, named: dict[str, int], ends: tuple[int, ...]) -> None:
    metadata = {f"tokenizer.ggml.{role}_token_id": token for role, token in named.items()}
    found = end_ids(metadata | {"tokenizer.ggml.tokens": tokens.split(), "tokenizer.ggml.model": "gpt2"}, 4)
    assert sorted(found) == sorted(ends)
    assert not named.get("eos") or found[0] == named["eos"] or named["eos"] not in ends


@pytest.mark.parametrize("token", [2**32 - 1, -1, 9999, 330])
@pytest.mark.parametrize("role", ["eos", "eot", "eom", "bos"])
def test_an_id_outside_the_vocabulary_is_left_out_and_said(
    role: str, token: int, words: dict[str, Any], tmp_path: Path
) -> None:
    ids = {f"tokenizer.ggml.{name}_token_id": at for name, at in {"bos": 0, "eos": 1}.items() if name != role}
    assert len(words["tokenizer.ggml.tokens"]) == 330
    path = write_gguf(tmp_path / "m.gguf", words | ids | {f"tokenizer.ggml.{role}_token_id": token})
    said = rf"tokenizer\.ggml\.{role}_token_id={token} is outside the vocabulary of 330 tokens: ignored"
    with pytest.warns(UserWarning, match=said):
        config = open_checkpoint(path).config
    assert config.eos_ids == (1,)  # by its text, "</s>", where the id is not there
    assert config.bos_id == (None if role == "bos" else 0)
    with pytest.warns(UserWarning, match=said):
        tokenizer = load_tokenizer(path)
    assert tokenizer.encode("year", bos=False) == tokenizer.encode("year")[-len(tokenizer.encode("year", bos=False)) :]


def test_a_sentencepiece_vocabulary_has_ids_of_its_own_kind(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", pieces(model) | {"tokenizer.ggml.bos_token_id": 2**32 - 1})
    with pytest.warns(UserWarning, match=r"bos_token_id=4294967295 .*: 1 is used"):
        assert load_tokenizer(path).encode("over")[0] == 1
    with pytest.warns(UserWarning, match="bos_token_id"):
        assert open_checkpoint(path).config.bos_id == 1


def test_an_end_of_text_after_every_text_is_not_done_and_said(model: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.add_eos_token is ignored"):
        tokenizer = made(tmp_path, pieces(model) | {"tokenizer.ggml.add_eos_token": True})
    assert tokenizer.encode("over") == [1, *model.encode("over")]


# --- what decides which tokens there are ----------------------------------------------------------


def test_the_kind_of_a_token_decides_where_it_is_found_and_shown(words: dict[str, Any], tmp_path: Path) -> None:
    added = {"<c>": CONTROL, "<u>": USER_DEFINED, "<n>": UNUSED, "<o>": NORMAL, "    ": USER_DEFINED}
    metadata = with_tokens(words, added) | {"tokenizer.ggml.eos_token_id": 1}
    size = len(words["tokenizer.ggml.tokens"])
    tokenizer = made(tmp_path, metadata)
    ids = tokenizer.encode("it<c>it<u>it    it")
    assert [token for token in ids if token >= size] == [size, size + 1, size + 4]
    assert tokenizer.decode(ids) == "itit<u>it    it"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "it<c>it<u>it    it"
    assert max(tokenizer.encode("it<n>it<o>")) < size
    assert tokenizer.decode(tokenizer.encode("it<n>it<o>")) == "it<n>it<o>"


@pytest.mark.parametrize("name", ["Phi-3-mini-4k", "phi3 llamafied", "Llama"])
def test_a_phi_swallows_whitespace_behind_its_special_tokens(
    name: str, words: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    for index, vocabulary in enumerate((words, pieces(model))):
        (tmp_path / str(index)).mkdir()
        metadata = with_tokens(vocabulary, {"<|end|>": CONTROL}) | {"general.name": name}
        end = len(metadata["tokenizer.ggml.tokens"]) - 1
        tokenizer = made(tmp_path / str(index), metadata)
        taken = tokenizer.encode("it<|end|> \n it", bos=False)
        kept = tokenizer.encode("it", bos=False)
        assert (taken == [*kept, end, *kept]) is (name != "Llama")


def test_an_empty_token_has_a_place_and_no_text(words: dict[str, Any], tmp_path: Path) -> None:
    metadata = with_tokens(words, {"<c>": CONTROL})
    metadata["tokenizer.ggml.tokens"] += ["", ""]
    metadata["tokenizer.ggml.token_type"] += [UNUSED, UNUSED]
    tokenizer = made(tmp_path, metadata)
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    assert tokenizer.decode(tokenizer.encode("it's 12")) == "it's 12"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model='t5' is not supported (known: gpt2, llama)"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model=None"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "holds 'ab', which is no pair, at 0"),
        ({"tokenizer.ggml.merges": ["a zzzz"]}, "holds 'a zzzz' at 0, of which a part or the whole is no token"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type holds 2 values for 330 tokens"),
        ({"tokenizer.ggml.token_type": ["a"] * 330}, "tokenizer.ggml.token_type is no array of int"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens is no array of str"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml.eos_token_id='x' must be a token id"),
        ({"tokenizer.ggml.eot_token_id": 0.5}, "tokenizer.ggml.eot_token_id=0.5 must be a token id"),
        ({"tokenizer.ggml.add_bos_token": "false"}, "tokenizer.ggml.add_bos_token='false' must be true or false"),
        ({"tokenizer.ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token=1 must be true or false"),
        ({"tokenizer.ggml.add_eos_token": "no"}, "tokenizer.ggml.add_eos_token='no' must be true or false"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is no text"),
        ({"tokenizer.chat_template.rag": 3}, "tokenizer.chat_template.rag is no text"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused_by_its_field(
    change: dict[str, Any], message: str, words: dict[str, Any], tmp_path: Path
) -> None:
    refused(tmp_path, words | change, message)


def test_a_token_that_is_there_twice_is_refused(words: dict[str, Any], tmp_path: Path) -> None:
    refused(tmp_path, with_tokens(words, {"year": NORMAL}) | {"tokenizer.ggml.merges": []}, "tokenizer.ggml.tokens")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.scores": [float("nan")] * 400}, "tokenizer.ggml.scores holds what is no number"),
        ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores holds 1 values"),
        ({"tokenizer.ggml.add_space_prefix": "false"}, "tokenizer.ggml.add_space_prefix='false' must be true or"),
        ({"tokenizer.ggml.remove_extra_whitespaces": 1}, "tokenizer.ggml.remove_extra_whitespaces=1 must be true or"),
        ({"tokenizer.ggml.precompiled_charsmap": [1.5]}, "tokenizer.ggml.precompiled_charsmap is no array of bytes"),
    ],
)
def test_a_sentencepiece_vocabulary_that_is_none_is_refused_by_its_field(
    change: dict[str, Any], message: str, model: Any, tmp_path: Path
) -> None:
    refused(tmp_path, pieces(model) | change, message)


def test_what_sentencepiece_refuses_is_refused_in_its_words(model: Any, tmp_path: Path) -> None:
    refused(tmp_path, pieces(model) | {"tokenizer.ggml.precompiled_charsmap": [0] * 8}, "sentencepiece refuses it: ")


def test_a_byte_that_is_none_is_refused(model: Any, tmp_path: Path) -> None:
    refused(tmp_path, with_tokens(pieces(model), {"<0xZZ>": BYTE}), "'<0xZZ>', is of the kind byte, and no byte")


# --- the cache ------------------------------------------------------------------------------------


def test_another_vocabulary_or_another_conversion_is_another_entry(
    words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_ref.tokenizers import gguf_tokenizer

    first = made(tmp_path, words | {PRE: "gpt-2"}).encode("12345")
    assert made(tmp_path, words | {PRE: "smollm"}).encode("12345") != first
    entries = set((tmp_path / "cache" / "tokenizers").iterdir())
    assert len(entries) == 2
    for entry in entries:  # what an older version derived
        (entry / JSON_FILE).write_text("{}")
    monkeypatch.setattr(gguf_tokenizer, "CONVERSION", gguf_tokenizer.CONVERSION + 1)
    assert made(tmp_path, words | {PRE: "gpt-2"}).encode("12345") == first


def test_no_conversion_of_another_library_has_a_part(
    words: dict[str, Any], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for index, metadata in enumerate((words, pieces(model))):
        (tmp_path / str(index)).mkdir()
        monkeypatch.undo()
        path = write_gguf(tmp_path / str(index) / "m.gguf", metadata, tensors={})
        monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
        monkeypatch.setitem(sys.modules, "transformers", None)
        monkeypatch.setitem(sys.modules, "gguf", None)
        assert load_tokenizer(path).encode("over")


def test_settings_name_what_a_template_may_ask_for(words: dict[str, Any]) -> None:
    told = settings_of(
        words
        | {
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "{{ bos_token }}",
        }
    )
    assert (told["bos_token"], told["eos_token"], told["chat_template"]) == ("<s>", "</s>", "{{ bos_token }}")
