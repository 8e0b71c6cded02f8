"""The table of who may import whom, read from the sources; and what importing the library brings in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FACTS = tuple(
    f"llama_ref.{name}"
    for name in (
        *("arguments", "cache_folder", "checkpoint", "command", "config", "convert", "interrupts", "models", "weights"),
        *(
            "formats.gguf_blocks",
            "formats.packed_bits",
            "formats.saved",
            "tokenizers.chat",
            "tokenizers.chat_templates",
        ),
        *("tokenizers.contract", "tokenizers.tokenizer", "tokenizers.tokenizer_files"),
    )
)
"""What describes files is shared by both Llamas; what says how a Llama computes is written twice."""

READERS = tuple(
    f"llama_ref.{name}" for name in ("arguments", "cache_folder", "config", "formats", "rope_scaling", "weights")
)
"""What a reader of files may import."""

LEAVES = ("arithmetic", "encodings", "caches", "compilers", "parallel")
"""The folders of a plan's slots: none imports another."""

FLOORS = {
    "choosing": (),
    "processes": (),
    "step": (),
    "contracts": ("choosing", "processes", "step"),
    "devices": (),
    "kernels": (),
    "model": ("contracts", "step"),
    **dict.fromkeys(LEAVES, ("choosing", "contracts", "kernels", "model", "processes", "step")),
    "plan": ("contracts", *LEAVES),
    "recipes": ("contracts", "plan", *LEAVES),
    "weights": ("contracts", "model", "plan", "recipes", *LEAVES),
    "engine": ("choosing", "contracts", "model", "processes", "plan", "weights", *LEAVES),
    "speculative": ("contracts", "model", "compilers", "plan", "engine", "caches", "parallel"),
    "build": ("contracts", "devices", "model", "plan", "recipes", "weights", "engine", *LEAVES),
    "calibration": ("contracts", "model", "plan", "weights", *LEAVES),
    "grammars": ("engine",),
    "llama": ("contracts", "devices", "plan", "engine", "build", "recipes", "grammars", *LEAVES),
    "chat": ("contracts", "plan", "engine", "build", "recipes", "llama", "caches"),
    "lm_eval_settings": (),
    "lm_eval_model": ("contracts", "devices", "plan", "engine", "build", "recipes", "llama", "lm_eval_settings"),
    "serve": ("engine", "grammars", "llama", "build", "devices", "parallel", "plan", "recipes"),
    "__init__": ("plan", "engine", "build", "llama", "chat"),
    "ladder": ("*",),
    "cli": ("ladder",),
    "__main__": ("ladder",),
}
"""What each folder, or file beside the folders, of `llama_fast` may import besides itself: one rule a folder."""

ORACLE_FLOORS = {
    "statistics": (),
    "subjects": ("statistics",),
    "questions": ("statistics", "subjects"),
    "report": ("statistics", "questions"),
}
TWINS_ALLOWED = ("subjects", "questions")  # of the oracle's folders, those that know the Llamas


def modules_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def ours(path: Path) -> set[str]:
    return {name for name in modules_imported(path) if name.split(".")[0] in ("llama_ref", "llama_fast", "oracle")}


def outside(names: set[str], *allowed: str) -> set[str]:
    return {name for name in names if not any(name == a or name.startswith(a + ".") for a in allowed)}


def files(pattern: str) -> list[Path]:
    found = sorted(ROOT.glob(pattern))
    assert found, pattern
    return found


def place(path: Path) -> str:
    """The folder of a file, or the file itself where it stands beside the folders: model/llama.py -> "model"."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", files("llama_ref/**/*.py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_reference_imports_nothing_of_ours(path: Path) -> None:
    """Its readers of files know neither the model nor who opens them; a tokenizer may look into a file's header."""
    below = {
        "formats": (*READERS, "llama_ref.tokenizers.tokenizer_files"),
        "tokenizers": (*READERS, "llama_ref.tokenizers"),
    }.get(place(path), ("llama_ref",))
    assert not outside(ours(path), *below)


@pytest.mark.parametrize("path", files("llama_fast/**/*.py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folder_imports_only_what_stands_below_it(path: Path) -> None:
    """The ladder is the top floor: it alone may import the oracle."""
    floor = place(path)
    below = FLOORS[floor]
    if below == ("*",):
        assert not outside(ours(path), *FACTS, "llama_fast", "oracle")
        return
    allowed = {f"llama_fast.{name}" for name in (floor, *below)}
    assert not outside(ours(path) - {"llama_fast"}, *FACTS, *allowed)


def test_no_floor_stands_above_one_that_imports_it() -> None:
    """The rules themselves go one way: they can be laid out as floors."""
    placed: set[str] = set()
    left = {floor: set(below) - {"*"} for floor, below in FLOORS.items()}
    while left:
        free = {floor for floor, below in left.items() if below <= placed}
        assert free, f"a circle among {sorted(left)}"
        placed |= free
        left = {floor: below for floor, below in left.items() if floor not in free}


def test_every_file_has_its_place() -> None:
    assert {place(path) for path in files("llama_fast/**/*.py")} == FLOORS.keys()


@pytest.mark.parametrize("path", files("oracle/*/*.py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_oracle_has_floors_and_its_statistics_know_torch_alone(path: Path) -> None:
    floor = place(path)
    allowed = [f"oracle.{name}" for name in (floor, *ORACLE_FLOORS[floor])]
    if floor in TWINS_ALLOWED:
        allowed += ["llama_ref", "llama_fast"]
    assert not outside(ours(path), *allowed)


def defined(module: str) -> set[str] | None:
    """The names that a module of ours has, as its source says; None for what is no module."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_dir() and not source.is_file():
        return None
    found = {file.stem for file in path.glob("*")}
    for node in ast.walk(ast.parse(source.read_text() if source.is_file() else "")):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_whatever_is_imported_of_ours_is_there() -> None:
    """Also by scripts that only a GPU, or a person, runs."""
    known, missing = {}, []
    for path in files("[dlot]*/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is None or module.split(".")[0] not in ("llama_ref", "llama_fast", "oracle", "tests"):
                continue
            if module not in known:
                known[module] = defined(module)
            absent = {alias.name for alias in node.names} - (known[module] or set())
            missing += [f"{path.relative_to(ROOT)}: {module}.{name}" for name in absent]
    assert not missing


def test_importing_the_library_brings_in_no_heavy_neighbour() -> None:
    heavy = ("transformers", "matplotlib", "typer", "rich", "gguf", "tokenizers", "huggingface_hub", "triton", "oracle")
    heavy += ("llguidance", "ray")
    code = (
        "import sys, torch; before = set(sys.modules); import llama_fast; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_library_costs_little_beyond_torch() -> None:
    """Processor time, so that what else the machine does is not counted; the best of three. Garbage among PyTorch's own objects,
    which some import or other sets off a search of, is not ours."""
    clock = "began = time.process_time(); import llama_fast; print(time.process_time() - began)"
    code = f"import gc, time, torch; gc.freeze(); {clock}"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(done.stdout) for done in runs) < 0.150
