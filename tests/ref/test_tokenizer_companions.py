"""What stands beside a tokenizer.json: tokens and special tokens are those that transformers finds in the same directory."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from llama_ref.tokenizers.tokenizer import load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CORPUS = ["hello world, how are you", "over the lazy dog 42 times", "naïve café"] * 9
TOKENS = ("<s>", "</s>", "<|im_end|>", "<pad>", "<tool>", "<tool>x", "café", "word", "  ")
PIECES = ("hello", " ", "  ", "world", "x", "cafe\N{COMBINING ACUTE ACCENT}", "é", "\n", "漢", "▁", ".", "over")
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")
CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", "TokenizersBackend", "Unheard")


def byte_level(normalizer: Any = None) -> dict[str, Any]:
    """A trained byte-level tokenizer.json without added tokens, as data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return json.loads(backend.to_str())


def with_spaces_marked() -> dict[str, Any]:
    """A trained tokenizer.json as Llama 2 has it: a space before every stretch, byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    backend: Any = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90))
    data = json.loads(backend.to_str())
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *data["model"]["vocab"]]
    data["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "unk_token": "<unk>"}
    data["model"] |= {"byte_fallback": True, "fuse_unk": True}
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    data["decoder"] = json.loads(backend.to_str())["decoder"]
    return data


@pytest.fixture(scope="module")
def vocabularies() -> dict[str, dict[str, Any]]:
    from tokenizers import normalizers

    return {"bytes": byte_level(), "composed": byte_level(normalizers.NFC()), "spaces": with_spaces_marked()}


def flags(special: bool | None = None) -> st.SearchStrategy[dict[str, Any]]:
    chosen = st.fixed_dictionaries({name: st.booleans() for name in ("single_word", "lstrip", "rstrip", "normalized")})
    return chosen.flatmap(
        lambda base: (st.booleans() if special is None else st.just(special)).map(lambda s: base | {"special": s})
    )


def spelled() -> st.SearchStrategy[Any]:
    """A token as tokenizer_config.json spells it."""
    text = st.sampled_from(TOKENS)
    return text | st.tuples(text, flags()).map(lambda pair: {"__type": "AddedToken", "content": pair[0]} | pair[1])


@st.composite
def directories(draw: st.DrawFn) -> dict[str, Any]:
    """A vocabulary by name, tokens that its tokenizer.json adds, and the companions' data by file name."""
    made: dict[str, Any] = {"vocabulary": draw(st.sampled_from(["bytes", "composed", "spaces"]))}
    made["pieces"] = draw(st.lists(st.sampled_from(TOKENS), unique=True, max_size=3))
    made["added"] = draw(st.dictionaries(st.sampled_from(TOKENS), flags(), max_size=3))
    stated: dict[str, Any] = draw(st.dictionaries(st.sampled_from(NAMES), st.none() | spelled(), max_size=4))
    if draw(st.booleans()):
        stated["tokenizer_class"] = draw(st.sampled_from(CLASSES))
    for name, values in {
        "add_prefix_space": st.sampled_from([None, True, False]),
        "legacy": st.booleans(),
        "split_special_tokens": st.just(True),
        "additional_special_tokens": st.lists(spelled(), max_size=2),
        "extra_special_tokens": st.lists(spelled(), max_size=2)
        | st.dictionaries(st.sampled_from(["image_token", "video"]), spelled(), max_size=2),
    }.items():
        if draw(st.integers(0, 3)) == 0:
            stated[name] = draw(values)
    listed = draw(st.none() | st.dictionaries(st.sampled_from(TOKENS), flags(), max_size=3))
    made["listed"] = listed
    made["tokenizer_config.json"] = stated
    if draw(st.booleans()):
        plain = st.tuples(st.sampled_from(TOKENS), flags(True)).map(lambda pair: {"content": pair[0]} | pair[1])
        token = st.sampled_from(TOKENS) | plain
        mapped: dict[str, Any] = draw(st.dictionaries(st.sampled_from(NAMES), token, max_size=3))
        if draw(st.booleans()):
            key = draw(st.sampled_from(["additional_special_tokens", "extra_special_tokens"]))
            mapped[key] = draw(st.lists(st.sampled_from(TOKENS), max_size=2))
        made["special_tokens_map.json"] = mapped
    if draw(st.integers(0, 3)) == 0:
        made["added_tokens.json"] = draw(st.lists(st.sampled_from(TOKENS), unique=True, max_size=2))
    made["model_type"] = draw(st.sampled_from(["llama", "llama", "mistral"]))
    return made


def write(made: Mapping[str, Any], data: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    data = json.loads(json.dumps(data))
    for token in made["pieces"]:
        data["model"]["vocab"].setdefault(token, len(data["model"]["vocab"]))
    backend = Tokenizer.from_str(json.dumps(data))
    backend.add_tokens([AddedToken(content, **kind) for content, kind in made["added"].items()])
    backend.save(str(directory / "tokenizer.json"))
    size = backend.get_vocab_size()
    stated = dict(made["tokenizer_config.json"])
    new = iter(range(size, size + 99))

    def id_of(content: str) -> int:
        found = backend.token_to_id(content)
        return next(new) if found is None else found

    if made["listed"] is not None:
        kinds = made["listed"].items()
        stated["added_tokens_decoder"] = {str(id_of(content)): {"content": content} | kind for content, kind in kinds}
    (directory / "tokenizer_config.json").write_text(json.dumps(stated))
    if "special_tokens_map.json" in made:
        (directory / "special_tokens_map.json").write_text(json.dumps(made["special_tokens_map.json"]))
    if "added_tokens.json" in made:
        ids = {content: id_of(content) for content in made["added_tokens.json"]}
        (directory / "added_tokens.json").write_text(json.dumps(ids))
    (directory / "config.json").write_text(json.dumps({"model_type": made["model_type"]}))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    directories(), st.lists(st.lists(st.sampled_from(TOKENS + PIECES), max_size=8).map("".join), min_size=4, max_size=8)
)
def test_tokens_are_those_that_transformers_finds(
    vocabularies: dict[str, dict[str, Any]], made: dict[str, Any], texts: list[str]
) -> None:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        write(made, vocabularies[made["vocabulary"]], directory)
        theirs: Any = AutoTokenizer.from_pretrained(directory)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ids that the files list and that nobody gives
            ours = load_tokenizer(directory)
            copy = directory / "copy"
            copy.mkdir()
            ours.save(copy)
            again = load_tokenizer(copy)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    for text in texts:
        try:
            ids = theirs.encode(text, add_special_tokens=False)
        except BaseException as error:  # `tokenizers` panics where two tokens swallow the same white space
            assert type(error).__name__ == "PanicException"
            with pytest.raises(TokenizerError):
                ours.encode(text, bos=False)
            continue
        assert ours.encode(text, bos=False) == ids, text
        assert again.encode(text, bos=False) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text


def made_of(**changes: Any) -> dict[str, Any]:
    empty = {"pieces": [], "added": {}, "listed": None, "tokenizer_config.json": {}, "model_type": "llama"}
    return {**empty, **changes}


def saved(data: dict[str, Any], directory: Path, **files: Any) -> Path:
    """A directory of a tokenizer.json and companions, each given as data."""
    for name, content in {"tokenizer": data, "config": {"model_type": "llama"}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


TOOL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
ENDS = {"eos_token": "<|im_end|>"}
NAMED_BY_ONE_FILE = {
    "pieces that are added nowhere": made_of(
        pieces=["<s>", "<|im_end|>"], **{"tokenizer_config.json": {"bos_token": "<s>"} | ENDS}
    ),
    "named in the map alone": made_of(**{"special_tokens_map.json": {"bos_token": {"content": "<s>"}} | ENDS}),
    "added as no special token": made_of(
        added={"<|im_end|>": TOOL, "<s>": TOOL}, **{"tokenizer_config.json": ENDS | {"extra_special_tokens": ["<s>"]}}
    ),
    "by names of its own": made_of(
        **{"tokenizer_config.json": ENDS | {"extra_special_tokens": {"image_token": "<s>", "video": "<tool>"}}}
    ),
    "unnamed, in the old spelling": made_of(
        **{"tokenizer_config.json": {"additional_special_tokens": ["<s>", "<|im_end|>"]}}
    ),
    "unnamed, in the map": made_of(**{"special_tokens_map.json": {"additional_special_tokens": ["<s>", "<|im_end|>"]}}),
    "listed as special": made_of(
        added={"<|im_end|>": TOOL}, listed={name: TOOL | {"special": True} for name in ("<|im_end|>", "<s>")}
    ),
    "listed, and the map, which then is not read": made_of(
        listed={"<|im_end|>": TOOL | {"special": True}}, **{"special_tokens_map.json": {"bos_token": "<s>"}}
    ),
}


@pytest.mark.parametrize("name", list(NAMED_BY_ONE_FILE))
@pytest.mark.parametrize("vocabulary", ["bytes", "composed", "spaces"])
def test_a_token_that_one_file_alone_names_is_one_id_and_hidden(
    vocabularies: dict[str, dict[str, Any]], tmp_path: Path, vocabulary: str, name: str
) -> None:
    from transformers import AutoTokenizer

    write(NAMED_BY_ONE_FILE[name], vocabularies[vocabulary], tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert len(ours.encode("<|im_end|>", bos=False)) == 1
    assert ours.decode(ours.encode("hello<|im_end|>", bos=False)) == "hello"
    assert ours.vocab_size == len(theirs)
    for text in ("<s>hello<|im_end|>", "hello <|im_end|> <|im_end|><|im_end|>world", "cafe\u0301<s>café<tool>", ""):
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_objects_without_a_type_are_tokens_too(vocabularies: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """transformers 5 refuses them in tokenizer_config.json, where older versions wrote them."""
    settings = {"eos_token": {"content": "</s>", "lstrip": False}, "additional_special_tokens": [{"content": "<tool>"}]}
    ours = load_tokenizer(saved(vocabularies["bytes"], tmp_path, tokenizer_config=settings))
    assert ours.eos_ids == (300,)
    assert ours.special_tokens == {"eos_token": "</s>"}
    assert ours.encode("x</s><tool>", bos=False)[1:] == [300, 301]


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("vocabulary", ["bytes", "spaces"])
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"add_prefix_space": True}, {"add_prefix_space": False}])
def test_words_are_cut_as_the_class_says(
    vocabularies: dict[str, dict[str, Any]], tmp_path: Path, vocabulary: str, name: str, settings: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    if (name, vocabulary) == ("GPT2Tokenizer", "spaces") or (name[:4], vocabulary) == ("Code", "bytes"):
        return  # no such model: the class is for the other kind of vocabulary
    data = json.loads(json.dumps(vocabularies[vocabulary]))
    for piece in ("</s>", "<s>"):
        data["model"]["vocab"].setdefault(piece, len(data["model"]["vocab"]))
    saved(data, tmp_path, tokenizer_config={"tokenizer_class": name} | settings)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in ("hello world", " hello", "hello</s>world</s> how", "</s>hello", "漢 hello", "▁hello", ""):
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_what_cuts_digits_first_stays(tmp_path: Path, vocabularies: dict[str, dict[str, Any]]) -> None:
    """SmolLM2 names GPT2Tokenizer, of which transformers 5 makes a tokenizer that joins the space before a digit."""
    data = json.loads(json.dumps(vocabularies["bytes"]))
    digits = {"type": "Digits", "individual_digits": True}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
    named = load_tokenizer(saved(data, tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}))
    plain = JsonTokenizer({"tokenizer.json": json.dumps(data)})
    for text in ("a  42", "x 1", "42"):
        assert named.encode(text, bos=False) == plain.encode(text, bos=False)


def template(before: list[str], after: list[str], ids: dict[str, int]) -> dict[str, Any]:
    def part(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [*map(part, before), text, *map(part, after)]
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, text], "special_tokens": tokens}


@pytest.mark.parametrize("before", [[], ["<s>"], ["<pad>"], ["<pad>", "<s>"]])
@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("vocabulary", ["bytes", "spaces"])
def test_what_leads_a_text(
    vocabularies: dict[str, dict[str, Any]], tmp_path: Path, before: list[str], stated: bool | None, vocabulary: str
) -> None:
    """tokenizer.json says, as in transformers; `add_bos_token`, which transformers 5 drops beside it, is obeyed."""
    from transformers import AutoTokenizer

    data = json.loads(json.dumps(vocabularies[vocabulary]))
    size = len(data["model"]["vocab"])
    ids = {"<s>": size, "<pad>": size + 1}
    data["model"]["vocab"] |= ids
    if before:
        data["post_processor"] = template(before, [], {name: ids[name] for name in before})
    settings = {"bos_token": "<s>", "pad_token": "<pad>"} | ({} if stated is None else {"add_bos_token": stated})
    saved(data, tmp_path, tokenizer_config=settings)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    bare = ours.encode("hello", bos=False)
    for text, inner in (("hello", bare), ("", [])):
        ids_of_file = theirs.encode(text)
        if stated is None:
            assert ours.encode(text) == ids_of_file
        elif stated:
            assert ours.encode(text)[: -len(inner) or None].count(ids["<s>"]) == 1
        else:
            assert ours.encode(text) == [token for token in ids_of_file if token != ids["<s>"]]


def test_eos_behind_a_text_is_left_out_and_said(vocabularies: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    data = json.loads(json.dumps(vocabularies["bytes"]))
    data["model"]["vocab"]["</s>"] = 300
    data["post_processor"] = template([], ["</s>"], {"</s>": 300})
    with pytest.warns(UserWarning, match=r"tokenizer\.json: puts ids \[300\] behind a text"):
        ours = load_tokenizer(saved(data, tmp_path, tokenizer_config={"eos_token": "</s>"}))
    assert 300 not in ours.encode("hello")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_eos_token": True}, r"tokenizer_config\.json: add_eos_token is not followed"),
        ({"fix_mistral_regex": True}, r"tokenizer_config\.json: fix_mistral_regex is not followed"),
        (
            {
                "clean_up_tokenization_spaces": True,
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
            },
            r"tokenizer_config\.json: clean_up_tokenization_spaces is not followed",
        ),
        (
            {"added_tokens_decoder": {"999": {"content": "<tool>", "special": True}}},
            r"'<tool>' has the id 300 here, not 999 as listed",
        ),
    ],
)
def test_a_setting_that_is_not_followed_is_said(
    vocabularies: dict[str, dict[str, Any]], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        load_tokenizer(saved(vocabularies["bytes"], tmp_path, tokenizer_config=settings))


def test_spaces_are_cleaned_up_in_no_byte_pair_vocabulary(
    vocabularies: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Many files of Llama's say `clean_up_tokenization_spaces`; transformers 5 leaves their text alone, and so is it here."""
    from transformers import AutoTokenizer

    saved(vocabularies["bytes"], tmp_path, tokenizer_config={"clean_up_tokenization_spaces": True})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("hello . we 're , you", bos=False)
    assert ours.decode(ids) == theirs.decode(ids) == "hello . we 're , you"


def test_a_padding_token_of_tokenizer_json_is_special(vocabularies: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    data = vocabularies["bytes"] | {"padding": padding | {"pad_id": 300, "pad_type_id": 0, "pad_token": "<pad>"}}
    ours, theirs = load_tokenizer(saved(data, tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("a<pad>", bos=False) == theirs.encode("a<pad>") == [64, 300]
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": 3}}, r"tokenizer_config\.json: eos_token=3 is neither text nor"),
        ({"tokenizer_config": {"added_tokens_decoder": [3]}}, "added_tokens_decoder is no object"),
        ({"tokenizer_config": {"extra_special_tokens": 3}}, "extra_special_tokens=3 is not a list or an object"),
        ({"tokenizer_config": {"extra_special_tokens": {"a": 3}}}, "a=3 is neither text nor"),
        ({"special_tokens_map": {"additional_special_tokens": [[]]}}, "additional_special_tokens|extra_special_tokens"),
        ({"special_tokens_map": 3}, r"special_tokens_map\.json: holds no JSON object"),
        ({"added_tokens": {"": 3}}, r"added_tokens\.json: an added token must have text"),
    ],
)
def test_a_companion_that_makes_no_sense_is_refused_in_one_line(
    vocabularies: dict[str, dict[str, Any]], tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    saved(vocabularies["bytes"], tmp_path, **files)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 999) | st.sampled_from(["", "<s>", "7", "content", "é"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "special", "7", "__type", "<s>"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SETTINGS = ("tokenizer_class", "legacy", "add_prefix_space", "add_bos_token", "chat_template", "split_special_tokens")
SETTINGS += ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", *NAMES)


@given(
    st.dictionaries(st.sampled_from(SETTINGS), ANYTHING, max_size=4),
    st.dictionaries(st.sampled_from(SETTINGS), ANYTHING, max_size=3),
    st.dictionaries(st.sampled_from(["<s>", "", "x"]), ANYTHING, max_size=2),
    st.dictionaries(st.sampled_from(["model_type", "tokenizer_class"]), ANYTHING),
)
def test_companions_of_any_content_are_read_or_refused(
    vocabularies: dict[str, dict[str, Any]], stated: dict[str, Any], mapped: Any, added: Any, config: Any
) -> None:
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = {"tokenizer_config": stated, "special_tokens_map": mapped, "added_tokens": added, "config": config}
        saved(vocabularies["spaces"], Path(place), **files)
        try:
            load_tokenizer(place).decode(load_tokenizer(place).encode("hello<s>"))
        except TokenizerError as error:
            assert "\n" not in str(error)


def test_a_token_beyond_the_models_table_is_refused_when_it_is_used(
    vocabularies: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    import torch

    from llama_fast import Llama

    directory = saved_model(tmp_path, vocabularies["bytes"])
    llama = Llama.from_pretrained(str(directory), device="cpu", dtype=torch.float32)
    assert llama.tokenizer.encode("<pad>", bos=False) == [300]
    assert llama.generate("hello", 2).ids
    with pytest.raises(ValueError, match=r"^a prompt's token id 300 is outside the vocabulary of 300$"):
        llama.generate("hello<pad>", 2)


def saved_model(directory: Path, data: dict[str, Any]) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=300, max_position_embeddings=64)).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(json.dumps(data))
    (directory / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    return directory
