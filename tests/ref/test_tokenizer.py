"""Tokenizers: the ids that other readers of the same files find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_ref.models import Model, resolve
from llama_ref.tokenizers import gguf_tokenizer
from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.gguf_tokenizer import settings_of
from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from llama_ref.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_ref.tokenizers.tokenizer import DEFAULT_PROMPT, RandomTokenizer, has_tokenizer, load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

CORPUS = ["Hello, my name is Lama.", "the cat sat on the mat, 42 times", "naïve café: é ü ß"] * 20
TEXTS = st.text(max_size=40)


def json_files(template: bool, **settings: Any) -> dict[str, str]:
    """A small byte-level tokenizer.json (<s> is 0, </s> is 1), with or without a template that puts BOS in front."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend: Any = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"],
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(3)  # left over from training, as real files have it
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | settings
    return {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(settings)}


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def json_tokenizer() -> JsonTokenizer:
    return JsonTokenizer(json_files(template=True))


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Trained here with Llama 2's settings: byte fallback, digits apart, <unk> 0, <s> 1, </s> 2."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer(directory)


@given(TEXTS)
@example("")
@example("a longer text than the three tokens to which the file would cut it")
def test_json_text_comes_back(json_tokenizer: JsonTokenizer, text: str) -> None:
    ids = json_tokenizer.encode(text)
    assert ids == [0, *json_tokenizer.encode(text, bos=False)]
    assert json_tokenizer.decode(ids) == text
    assert json_tokenizer.decode([*ids, 1]) == text  # special tokens are not text


def test_bytes_that_are_no_text_are_not_the_files_fault(json_tokenizer: JsonTokenizer) -> None:
    with pytest.raises(ValueError, match=r"^the text holds bytes that are not UTF-8$"):
        json_tokenizer.encode("ab" + b"\xff".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("template", [True, False])
def test_json_agrees_with_transformers(tmp_path: Path, template: bool) -> None:
    from transformers import AutoTokenizer

    directory = write(tmp_path, json_files(template))
    theirs: Any = AutoTokenizer.from_pretrained(directory)
    ours = load_tokenizer(directory)
    for text in [*CORPUS[:3], "", "</s> in the text", "  spaces  "]:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (theirs.bos_token_id, (theirs.eos_token_id,), len(theirs))


def test_bos_follows_the_files(tmp_path: Path) -> None:
    def lead(template: bool, **settings: Any) -> int:
        return JsonTokenizer(json_files(template, **settings)).encode("Hello")[0]

    assert lead(True) == 0
    assert lead(False) != 0
    assert lead(False, add_bos_token=True) == 0
    assert lead(True, add_bos_token=False) != 0
    assert lead(True, bos_token={"content": "<s>", "lstrip": False}) == 0
    assert lead(True, bos_token=None) == 0  # the template alone names it
    assert lead(False, bos_token=None, add_bos_token=True) != 0


@given(TEXTS)
@example("Hello, my name is")
def test_sentencepiece_text_comes_back(sentencepiece_tokenizer: SentencePieceTokenizer, text: str) -> None:
    text = text.replace("\0", "").replace("▁", "")  # sentencepiece's own mark for a space
    ids = sentencepiece_tokenizer.encode(text)
    assert ids[0] == sentencepiece_tokenizer.bos_id == 1
    assert ids[1:] == sentencepiece_tokenizer.encode(text, bos=False)
    assert sentencepiece_tokenizer.decode([*ids, 2, 99999]) == text


def test_sentencepiece_facts_and_settings(sentencepiece_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    assert (sentencepiece_tokenizer.eos_ids, sentencepiece_tokenizer.vocab_size) == ((2,), 330)
    sentencepiece_tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("Hello") == sentencepiece_tokenizer.encode("Hello")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).encode("Hello") == sentencepiece_tokenizer.encode("Hello", bos=False)


def test_a_saved_tokenizer_is_the_same(json_tokenizer: JsonTokenizer, tmp_path: Path) -> None:
    json_tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(CORPUS[0]) == json_tokenizer.encode(CORPUS[0])
    assert (again.bos_id, again.eos_ids, again.vocab_size) == (0, (1,), json_tokenizer.vocab_size)


def test_the_random_tokenizer(tmp_path: Path) -> None:
    tokenizer = RandomTokenizer(32000, 1, (2,))
    assert tokenizer.encode(DEFAULT_PROMPT) == [1, 15043, 29892, 590, 1024, 338]
    assert tokenizer.encode(DEFAULT_PROMPT, bos=False) == [15043, 29892, 590, 1024, 338]
    assert tokenizer.encode("Hé") == [72, 195, 169]
    assert RandomTokenizer(100, None, ()).encode("Hé") == [72, 95, 69]
    assert tokenizer.decode([5, 0, 31999]) == "5 0 31999"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_ids, again.vocab_size) == (1, (2,), 32000)
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["model.pth", "consolidated.00.pth"])
def test_the_tokenizer_of_a_file_of_weights_stands_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    model = resolve(str(tmp_path / name))
    assert not model.has_tokenizer
    with pytest.raises(TokenizerError, match=f"{tmp_path}: neither tokenizer.json nor"):
        model.tokenizer()
    write(tmp_path, json_files(template=True))
    assert model.has_tokenizer
    assert model.tokenizer().encode("Hello") == load_tokenizer(tmp_path).encode("Hello")


def test_absent_and_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(fragment: str) -> None:
        with pytest.raises(TokenizerError, match=fragment) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)

    refused("neither tokenizer.json nor tokenizer.model")
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format, as Llama 3 ships it
    assert has_tokenizer(tmp_path)
    refused("no token for 254 of the 256 bytes")
    (tmp_path / "tokenizer.model").write_bytes(b"\0 what is this")
    refused("neither a sentencepiece model nor a tiktoken file")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("not a readable tokenizer.json")
    write(tmp_path, json_files(template=True))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    refused("holds no JSON object")
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused("not readable as JSON")


@pytest.mark.parametrize("prefix", ["##", "@", "", None])
def test_a_prefix_inside_words_is_refused_by_its_name(prefix: str | None, tmp_path: Path) -> None:
    """In a vocabulary of merges, as BERT's cut marks them; the file is valid, and the tokenizers library reads it."""
    from tokenizers import Tokenizer as Backend

    model = {"type": "BPE", "vocab": {"a": 0, f"{prefix or ''}b": 1, "ab": 2}, "merges": [["a", f"{prefix or ''}b"]]}
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": model | {"continuing_subword_prefix": prefix}})
    assert Backend.from_str(text).encode("ab").ids == [2]
    write(tmp_path, {"tokenizer.json": text})
    if not prefix:
        assert load_tokenizer(tmp_path).encode("ab") == [2]
        return
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    told = f"{tmp_path / 'tokenizer.json'}: continuing_subword_prefix={prefix!r} is not supported beside merges"
    assert str(caught.value) == told


class PanicException(BaseException):
    """Named as what the tokenizers library raises when its Rust code panics, which cannot be imported."""


class Failing:
    """A backend that fails at every text, as the library's own does at a few."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def encode(self, text: str, add_special_tokens: bool) -> None:
        raise self.error

    def decode(self, ids: list[int], skip_special_tokens: bool) -> None:
        raise self.error


@pytest.mark.parametrize("error", [PanicException("out of\nrange"), Exception("out of\nrange")])
def test_a_text_that_the_library_fails_at_does_not_accuse_the_file(
    error: BaseException, json_tokenizer: JsonTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_tokenizer, "_backend", Failing(error))
    with pytest.raises(TokenizerError) as caught:
        json_tokenizer.encode("Hello")
    assert str(caught.value) == "tokenizer.json: the tokenizers library cannot encode this text (out of range)"
    with pytest.raises(TokenizerError) as caught:
        json_tokenizer.decode([5])
    assert str(caught.value) == "tokenizer.json: the tokenizers library cannot decode these ids (out of range)"


def test_an_interrupt_in_the_library_stays_one(json_tokenizer: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_tokenizer, "_backend", Failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        json_tokenizer.encode("Hello")


@pytest.mark.parametrize(
    ("metadata", "adds_bos"),
    [
        ({"tokenizer.ggml.model": "llama"}, True),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}, False),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_gguf_settings(metadata: dict[str, Any], adds_bos: bool) -> None:
    tokens = {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"], "tokenizer.ggml.bos_token_id": 1}
    settings = settings_of(tokens | metadata | {"tokenizer.ggml.eos_token_id": 2})
    assert (settings["add_bos_token"], settings["bos_token"], settings["eos_token"]) == (adds_bos, "<s>", "</s>")


def test_the_default_models_tokenizer(default_model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its first six ids are published; transformers, on the same file, is the witness for the rest."""
    from transformers import AutoTokenizer

    assert default_model.path is not None
    assert default_model.has_tokenizer
    ours = default_model.tokenizer()
    assert ours.encode(DEFAULT_PROMPT) == [19556, 28, 957, 1462, 314]
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, (2,), 49152)
    theirs: Any = AutoTokenizer.from_pretrained(default_model.path.parent, gguf_file=default_model.path.name)
    for text in ["The year 1969, naïve café — 😀\n\n\tdef f(x): return x**2", "<|im_start|>user\nHi<|im_end|>\n", ""]:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)

    # once derived, it is read from the cache: transformers is not asked again
    def unexpected(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(gguf_tokenizer, "_convert", unexpected)
    assert default_model.tokenizer().encode(DEFAULT_PROMPT) == ours.encode(DEFAULT_PROMPT)
    default_model.tokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).encode(DEFAULT_PROMPT) == ours.encode(DEFAULT_PROMPT)


def test_what_stands_beside_a_gguf_is_not_its_tokenizer(
    default_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_model.path is not None
    (tmp_path / "model.gguf").symlink_to(default_model.path)
    write(tmp_path, json_files(template=True, chat_template="another model's"))
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    assert load_tokenizer(tmp_path / "model.gguf").encode(DEFAULT_PROMPT) == [19556, 28, 957, 1462, 314]


def test_a_damaged_cache_entry_is_derived_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["<s>", "</s>"])
    writer.add_token_types([3, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    derived = []

    def convert(path: Path) -> str:
        derived.append(path)
        return json_files(template=False)["tokenizer.json"]

    monkeypatch.setattr(gguf_tokenizer, "_convert", convert)
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "cache"))
    first = load_tokenizer(path).encode("Hello")
    assert load_tokenizer(path).encode("Hello") == first
    assert len(derived) == 1
    next((tmp_path / "cache").glob("tokenizers/*/tokenizer_config.json")).unlink()
    assert load_tokenizer(path).encode("Hello") == first
    assert len(derived) == 2
    assert load_tokenizer(path).encode("Hello") == first
    assert len(derived) == 2
    (tmp_path / "blocked").write_text("a file where the cache folder should be")
    monkeypatch.setenv("LLAMA_FAST_CACHE", str(tmp_path / "blocked"))
    assert load_tokenizer(path).encode("Hello") == first


def test_a_gguf_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "bare.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(TokenizerError, match=r"bare\.gguf: holds no tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_that_git_lfs_left_is_told_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n")
    with pytest.raises(TokenizerError, match=rf"/{name}: a Git LFS pointer, not the file itself; fetch that with `git"):
        load_tokenizer(tmp_path)
