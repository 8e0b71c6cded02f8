"""The table of fields in docs/formats.md holds every field that the readers read, and no other."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.ref.fields_read import Read, reads_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "formats.md"
GGUF = "GGUF"
FILES_OF: dict[str, tuple[str, ...]] = {  # module -> the files whose fields it reads
    "added_tokens": ("tokenizer_config.json", "special_tokens_map.json"),
    "awq": ("config.json",),
    "chat_templates": ("tokenizer_config.json",),
    "companions": ("tokenizer_config.json", "special_tokens_map.json"),
    "compressed_tensors": ("config.json",),
    "convert": ("config.json",),
    "foreign": ("config.json",),
    "fp8_files": ("config.json",),
    "gguf_byte_pair": (GGUF,),
    "gguf_config": (GGUF,),
    "gguf_file": (GGUF,),
    "gguf_header": (GGUF,),
    "gguf_rope": (GGUF,),
    "gguf_sentencepiece": (GGUF,),
    "gguf_tokenizer": (GGUF,),
    "gguf_vocabulary": (GGUF,),
    "gptq": ("config.json",),
    "hf_config": ("config.json",),
    "hf_rope": ("config.json",),
    "huggingface": ("config.json", "generation_config.json"),
    "lora_config": ("adapter_config.json",),
    "json_tokenizer": ("tokenizer_config.json", "tokenizer.json"),
    "meta_config": ("params.json",),
    "pickled_files": (".bin, .pth",),
    "saved": ("config.json",),
    "sentencepiece_tokenizer": ("tokenizer_config.json",),
    "sharded_files": ("*.index.json",),
    "tokenizer": ("random_tokenizer.json",),
    "token_bytes": ("tokenizer.json",),
    "torchao_files": ("safetensors",),
    "tokenizer_class": ("tokenizer_config.json", "config.json", "tokenizer.json"),
}
NO_READERS = {  # modules that read no field of a file
    *(
        "__init__",
        "arguments",
        "cache_folder",
        "chat",
        "checkpoint",
        "command",
        "config",
        "gguf_blocks",
        "contract",
        "fields",
        "generate",
    ),
    *(
        "gguf_pretokenizers",
        "interrupts",
        "lfs_pointers",
        "lora",
        "low_rank",
        "meta_layout",
        "model",
        "models",
        "packaged_model",
        "random_weights",
    ),
    *("rope_scaling", "safetensors_files", "sentencepiece_model", "tied_tables", "tiktoken_file", "tokenizer_files"),
    *("narrow", "packed_bits", "quantised", "weight_files", "weights"),
}
NO_FIELDS = {  # what is asked for something else than a field of a file
    *("files", "message", "named", "stored", "tensors", "checkpoint.weights", "name", "shard", "OF_MODEL", "expected"),
    *("quantised.stored", "expected_shapes(config)"),
    *("_HF_CONTEXT", "DEFAULTS[name]", "self.chat_templates", "files.get(JSON_FILE, '')"),
}


def reads() -> list[Read]:
    """The reads of fields. A GGUF's all have a dot, so that "bos" there is a part of one."""
    found = [read for read in reads_of(ROOT / "llama_ref") if read.module in FILES_OF and read.holder not in NO_FIELDS]
    return [read for read in found if "." in read.field or FILES_OF[read.module] != (GGUF,)]


def rows() -> set[tuple[str, str]]:
    """(field, file) of each row under "Fields"; a row may name several fields, and several files."""
    section = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)
    lines = next(part for part in section if part.startswith("Fields\n")).splitlines()
    cells = [line.split("|")[1:3] for line in lines if line.startswith("| `")]
    assert len(cells) > 50
    return {
        (field, file)
        for fields, files in cells
        for field in re.findall(r"`([^`]+)`", fields)
        for file in re.findall(r"`([^`]+)`", files)
    }


def test_every_module_says_which_files_it_reads() -> None:
    modules = {path.stem for path in (ROOT / "llama_ref").rglob("*.py")}
    unknown = sorted(modules - FILES_OF.keys() - NO_READERS)
    assert not unknown, f"say in FILES_OF whose fields llama_ref/{unknown[0]}.py reads, or name it in NO_READERS"
    assert FILES_OF.keys() | NO_READERS <= modules and not FILES_OF.keys() & NO_READERS


def test_every_field_that_is_read_has_a_row() -> None:
    table = rows()
    lacking = [
        f"llama_ref/{read.module}.py:{read.line} asks {read.holder} for {read.field!r}; add to docs/formats.md:\n"
        f"| `{read.field}` | `{'`, `'.join(FILES_OF[read.module])}` | what it says | who wins |\n"
        f"(or, if {read.holder} holds no fields of a file, name it in NO_FIELDS)"
        for read in reads()
        if not any(fnmatchcase(field, read.field) and file in FILES_OF[read.module] for field, file in table)
    ]
    assert not lacking, "\n".join(lacking)


def test_every_row_is_a_field_that_is_read() -> None:
    found = [(read.field, file) for read in reads() for file in FILES_OF[read.module]]
    idle = [
        f"docs/formats.md has a row for `{field}` of {file}, which no reader reads: take it out"
        for field, file in sorted(rows())
        if not any(fnmatchcase(field, read) and file == place for read, place in found)
    ]
    assert not idle, "\n".join(idle)


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("def f(data): return data.get('a', 1), data['b'], 'c' in data, whole(data, 'd'), data.pop('e')", "abcde"),
        ("A = 'a'\ndef f(x): return x.get(A)", "a"),
        ("def f(x):\n    for n in ('a', 'b'):\n        x.get(n)\n    return [x[n] for n in ('c',)]", "abc"),
        ("def f(x): return [x.get(n, d) for n, d in (('a', 1), ('b', 2))]", "ab"),
        ("A, B = 'a', 'b'\ndef f(x): return x.get(A), B in x", "ab"),
        ("K = {'a': 1}\ndef f(x): return [x.get(n) for n, v in K.items()]", "a"),
        ("def f(x, y): x['a'] = 1; g(y, 'b'); return 'c'", ""),
    ],
)
def test_reads_are_found_however_they_are_spelled(tmp_path: Path, source: str, fields: str) -> None:
    (tmp_path / "m.py").write_text(source)
    assert sorted(read.field for read in reads_of(tmp_path)) == sorted(fields)


def test_names_put_together_are_found(tmp_path: Path) -> None:
    source = "K = 'k.'\ndef f(x, y):\n    return [x.get(f'{K}{n}_id') for n in ('a', 'b')] + [x[f'{y}!'], x[K + 'c']]"
    (tmp_path / "m.py").write_text(source)
    assert [read.field for read in reads_of(tmp_path)] == ["k.a_id", "k.b_id", "*!", "k.c"]
