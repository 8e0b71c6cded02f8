"""Real tokenizer files: ids equal transformers' on 2,000 generated strings per kind, and streamed pieces join to the whole.

The files are those that the packages mistral-common (sentencepiece) and llama-models (tiktoken) ship. For sentencepiece
the truth is the sentencepiece library itself. `transformers` agrees when it is given the file's merges in the order of
the file's scores, as the tokenizer.json files on the hub have them; its LlamaTokenizer of a bare tokenizer.model orders
them by id, which differs where two spaces meet, and adds no leading space where the text starts with one.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llama_fast.engine.text import TextStream
from llama_ref.models import Model
from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_ref.tokenizers.tokenizer import load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

STRINGS = 2000


def real_file(package: str, path: str) -> Path:
    """A file that a test dependency ships, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: its tokenizer files are the witnesses here")
    file = Path(spec.origin).parent / path
    if not file.is_file():
        pytest.skip(f"this version of {package} does not ship {path}")
    return file


def mistral(version: str) -> Path:
    names = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
    return real_file("mistral_common", f"data/{names[version]}")


def llama3() -> Path:
    return real_file("llama_models", "llama3/tokenizer.model")


ALPHABETS = (
    "the quick brown fox jumps over a lazy dog and then I said it's OK we'll see ",
    " \t\n\r  \n\n   ",
    "0123456789 1234567 3.14 1e-9 ",
    "éèüñçßøåžłğ ÀÉÎÕÜ ÆŒ ﬁ ſ ",
    "日本語のテキスト 中文字符 한국어 문장 ไทย हिन्दी العربية עברית ",
    "🙂👩\u200d👩\u200d👧🏽🇩🇪❤\ufe0f𝔘𝕟𝕚😀 ",
    "a\u0301e\u0308o\u0302\u200b\u200d\ufeff\u00a0\u2028 ",
    "def f(x):\n    return {'a': [1, 2]} # ok != <= >= -> :: \\ \" ` ",
    "▁_~^|<>[](){}@#$%&*+=;:,.!?'",
)


def strings(seed: int, specials: list[str], count: int = STRINGS) -> list[str]:
    """Words, whitespace, scripts, emoji, combining marks, code, any code point, and the tokenizer's special tokens."""
    draw = random.Random(seed)

    def anything() -> str:
        while True:
            point = draw.choice((draw.randrange(1, 0x250), draw.randrange(1, 0x3000), draw.randrange(1, 0x110000)))
            if not 0xD800 <= point < 0xE000:
                return chr(point)

    def piece() -> str:
        kind = draw.random()
        if kind < 0.1 and specials:
            return draw.choice(specials)
        if kind < 0.2:
            return "".join(anything() for _ in range(draw.randint(1, 4)))
        alphabet = draw.choice(ALPHABETS)
        if kind < 0.6:
            at = draw.randrange(len(alphabet))
            return alphabet[at : at + draw.randint(1, 24)]
        return "".join(draw.choice(alphabet) for _ in range(draw.randint(1, 8)))

    return ["".join(piece() for _ in range(draw.randint(0, 6))) for _ in range(count)]


@dataclass(frozen=True)
class Kind:
    ours: Tokenizer
    theirs: Any  # a tokenizer of transformers
    specials: list[str]
    comparable: Callable[[str], bool] = lambda text: True


def faithful(path: Path, legacy: bool, directory: Path) -> Any:
    """transformers' tokenizer over a sentencepiece file's own merges: all cuts of a piece, by the piece's score."""
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    normal = {
        piece: i
        for i, piece in enumerate(pieces)
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))
    }
    merges = []
    for piece, i in normal.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in normal and right in normal:
                merges.append((-model.get_score(i), normal[left], normal[right], left, right))
    merges.sort()
    vocabulary, pairs = {piece: i for i, piece in enumerate(pieces)}, [(left, right) for *_, left, right in merges]
    control = [AddedToken(p, special=True, normalized=False) for i, p in enumerate(pieces) if model.is_control(i)]
    if not legacy:
        return LlamaTokenizer(vocab=vocabulary, merges=pairs, legacy=False, additional_special_tokens=control)
    backend: Any = Backend(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([*control, AddedToken("<unk>", special=True, normalized=False)])
    backend.save(str(directory / "faithful.json"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "faithful.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def placed(file: Path, directory: Path, **settings: Any) -> Tokenizer:
    shutil.copyfile(file, directory / "tokenizer.model")
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


def sentencepiece_v1(directory: Path, model: Model) -> Kind:
    file = mistral("v1")
    return Kind(placed(file, directory), faithful(file, True, directory), ["<s>", "</s>", "<unk>"])


def sentencepiece_v3(directory: Path, model: Model) -> Kind:
    file = mistral("v3")
    return Kind(placed(file, directory), faithful(file, True, directory), ["</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"])


def sentencepiece_first_prefix_only(directory: Path, model: Model) -> Kind:
    file = mistral("v1")
    ours = placed(file, directory, legacy=False)
    # where a text starts with a space, or with a special token and then a space, transformers adds none of its own
    return Kind(ours, faithful(file, False, directory), ["<s>", "</s>"], lambda text: not text.startswith((" ", "▁")))


def sentencepiece_with_added_tokens(directory: Path, model: Model) -> Kind:
    from tokenizers import AddedToken

    file = mistral("v1")
    theirs = faithful(file, True, directory)
    theirs.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True)
    theirs.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tool>x", normalized=False)])
    theirs.add_tokens([AddedToken("<wide>", normalized=False, lstrip=True, rstrip=True)])
    decoder = {
        "32000": {"content": "<|im_start|>", "special": True},
        "32001": {"content": "<tool>", "special": False},
        "32002": {"content": "<tool>x", "special": False},
        "32003": {"content": "<wide>", "special": False, "lstrip": True, "rstrip": True},
    }
    ours = placed(file, directory, added_tokens_decoder=decoder)
    return Kind(ours, theirs, ["<|im_start|>", "<tool>", "<tool>x", " <wide> ", "<wide>", "</s>"])


def json_of_sentencepiece(directory: Path, model: Model) -> Kind:
    theirs = faithful(mistral("v3"), True, directory)
    theirs.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str())
    return Kind(load_tokenizer(directory), theirs, ["<s>", "[INST]", "[/INST]"])


def json_bytewise(directory: Path, model: Model) -> Kind:
    from transformers import PreTrainedTokenizerFast

    model.tokenizer().save(directory)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    return Kind(load_tokenizer(directory), theirs, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])


def tiktoken_llama3(directory: Path, model: Model) -> Kind:
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pytest.importorskip("tiktoken", reason="transformers reads a tiktoken file through the package of that name")
    file = llama3()
    specials = llama3_specials()
    converter = TikTokenConverter(vocab_file=str(file), extra_special_tokens=specials)
    theirs = PreTrainedTokenizerFast(tokenizer_object=converter.converted())
    return Kind(placed(file, directory), theirs, specials[:12])


def llama3_specials() -> list[str]:
    """As Meta's own tokenizer.py lists them."""
    source = real_file("llama_models", "llama3/tokenizer.py").read_text()
    listed = source[source.index("special_tokens = [") : source.index("reserved_tokens")]
    named = [word for word in listed.split('"') if word.startswith("<|")]
    assert len(named) == 12
    return named + [f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(named))]


KINDS = (
    *(sentencepiece_v1, sentencepiece_v3, sentencepiece_first_prefix_only, sentencepiece_with_added_tokens),
    *(json_of_sentencepiece, json_bytewise, tiktoken_llama3),
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, default_model: Model) -> Kind:
    made: Kind = request.param(tmp_path_factory.mktemp(request.param.__name__), default_model)
    return made


def test_ids_and_texts_are_those_of_transformers(kind: Kind) -> None:
    compared = 0
    for text in strings(1, kind.specials, STRINGS * 5 // 4):
        if not kind.comparable(text):
            continue
        theirs = kind.theirs.encode(text, add_special_tokens=False)
        ours = kind.ours.encode(text, bos=False)
        assert ours == theirs, text
        decoded = kind.theirs.decode(ours, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert kind.ours.decode(ours) == decoded, text
        compared += 1
    assert compared >= STRINGS


def test_streamed_pieces_join_to_the_whole_and_hold_whole_characters(kind: Kind) -> None:
    for text in strings(2, kind.specials):
        ids = kind.ours.encode(text, bos=False)
        stream = TextStream(kind.ours.decode)
        pieces = [stream.push(token) for token in ids]
        assert "�" not in "".join(pieces) or "�" in kind.ours.decode(ids)  # a vocabulary may lack bytes
        assert "".join(pieces) + stream.finish() == kind.ours.decode(ids), text


def test_a_continuation_is_what_follows_the_prompt(kind: Kind) -> None:
    """Given the prompt's last ids, the pieces are the text behind it, leading space and all."""
    for text in strings(3, kind.specials, STRINGS // 4):
        ids = kind.ours.encode(text, bos=False)
        for at in {1, len(ids) // 2, len(ids) - 1}:
            before = kind.ours.decode(ids[:at])
            if not 0 < at < len(ids) or before.endswith("�") or not before.strip():
                continue
            stream = TextStream(kind.ours.decode, before=ids[:at])
            shown = "".join(stream.push(token) for token in ids[at:]) + stream.finish()
            assert before + shown == kind.ours.decode(ids), (text, at)


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_between_special_tokens_ids_are_sentencepieces_own(version: str) -> None:
    import sentencepiece

    model: Any = sentencepiece.SentencePieceProcessor(model_file=str(mistral(version)))
    ours = SentencePieceTokenizer(mistral(version))
    for text in strings(4, []):
        if any(special in text for special in ours._ids):
            continue
        assert ours.encode(text) == [1, *model.encode(text)]
        if "\N{LOWER ONE EIGHTH BLOCK}" not in text:
            assert ours.decode(ours.encode(text)) == text == model.decode(model.encode(text))


def test_llama_3_ids_are_tiktokens_own() -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="the witness for Llama 3's own file")
    import base64

    lines = [line.split() for line in llama3().read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    specials = {token: len(ranks) + i for i, token in enumerate(llama3_specials())}
    source = real_file("llama_models", "llama3/tokenizer.py").read_text()
    pattern = source[source.index('pat_str = r"') + len('pat_str = r"') :].split('"  # noqa')[0]
    theirs = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    ours = load_tokenizer(llama3().parent)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (128000, (128001,), 128256)
    for text in strings(5, llama3_specials()[:12]):
        ids = ours.encode(text)
        assert ids == [128000, *theirs.encode(text, allowed_special="all")], text
        assert ours.decode(ours.encode(text, bos=False)) == theirs.decode([i for i in ids if i < 128000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "no token and rank|ranks of its"),
        (lambda text: text.replace(b" 5\n", b" 6\n"), "the ranks of its"),
        (lambda text: text + b"!!! 128000\n", "line 128001"),
        (lambda text: text + b"IQ== 128000\n", "line 128001"),
    ],
)
def test_a_damaged_tiktoken_file_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(change(llama3().read_bytes()))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)
