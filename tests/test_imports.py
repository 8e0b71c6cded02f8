"""The table of who may import whom, read from the sources; and what importing the library brings in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHASES = {"generate", "sampling", "logprobs", "acceptance", "pace", "ngrams", "speculation", "checks", "rounds"}
TRUNK = {"matvec", "attention", "compilation", "tuner_clock", "plan", "model", "build", "text", "roofline"} | PHASES
FACE = {
    "presets",
    "llama",
    "prompts",
    "chat",
    "bandwidth",
    "profiling",
    "rungs",
    "bench",
    "plots",
    "ranks",
    "jobs",
    "scaling",
    "report",
    "__init__",
}


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


@pytest.mark.parametrize("path", files("llama_ref/*.py"), ids=lambda p: p.stem)
def test_the_reference_imports_nothing_of_ours(path: Path) -> None:
    assert not outside(ours(path), "llama_ref")


FACTS = tuple(
    f"llama_ref.{name}"
    for name in (
        "config",
        "checkpoint",
        "tokenizer",
        "models",
        "saved",
        "convert",
        "chat",
        "command",
        "arguments",
        "interrupts",
    )
)


@pytest.mark.parametrize("path", files("llama_fast/**/*.py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_twin_shares_facts_and_no_argument(path: Path) -> None:
    allowed = (*FACTS, "llama_fast", "oracle") if path.name == "cli.py" else (*FACTS, "llama_fast")
    assert not outside(ours(path), *allowed)


@pytest.mark.parametrize("name", sorted(TRUNK))
def test_the_trunk_knows_no_leaf_and_no_face(name: str) -> None:
    assert not outside(ours(ROOT / f"llama_fast/{name}.py"), *FACTS, *(f"llama_fast.{other}" for other in TRUNK))


@pytest.mark.parametrize("path", files("llama_fast/optimisations/*.py"), ids=lambda p: p.stem)
def test_a_leaf_imports_no_other_leaf(path: Path) -> None:
    assert not outside(ours(path), *FACTS, *(f"llama_fast.{name}" for name in TRUNK), "llama_fast.kernels")


@pytest.mark.parametrize("path", files("llama_fast/kernels/*.py"), ids=lambda p: p.stem)
def test_kernels_stand_alone(path: Path) -> None:
    assert not outside(ours(path), "llama_fast.kernels")


def test_every_file_has_its_place() -> None:
    assert {path.stem for path in files("llama_fast/*.py")} == TRUNK | FACE | {"cli", "lm_eval_model", "__main__"}


def test_the_comparison_knows_torch_alone() -> None:
    """And the factors, which know nothing of ours themselves."""
    assert not outside(ours(ROOT / "oracle/compare.py"), "oracle.budget")
    assert not ours(ROOT / "oracle/budget.py")


@pytest.mark.parametrize("path", files("oracle/*.py"), ids=lambda p: p.stem)
def test_judging_knows_no_llama(path: Path) -> None:
    """The adapters make subjects of the Llamas; `verify` and `cli` put checkpoints, plans and words together.

    What callers hand over is looked at by one file for all three packages: it knows no Llama either.
    """
    composition = path.stem in (
        "adapters",
        "fast",
        "questions",
        "rungs",
        "again",
        "speculation",
        "law",
        "requests",
        "threads",
        "verify",
        "cli",
        "__main__",
        "spread",
    )
    allowed = (
        ("oracle", "llama_ref", "llama_fast")
        if composition
        else ("oracle", "llama_ref.arguments", "llama_ref.interrupts")
    )
    assert not outside(ours(path), *allowed)


def test_importing_the_library_brings_in_no_heavy_neighbour() -> None:
    heavy = ("transformers", "matplotlib", "typer", "rich", "gguf", "tokenizers", "huggingface_hub", "triton", "oracle")
    code = (
        "import sys, torch; before = set(sys.modules); import llama_fast; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_library_costs_little_beyond_torch() -> None:
    """Processor time, so that what else the machine does is not counted; the best of three."""
    code = "import time, torch; began = time.process_time(); import llama_fast; print(time.process_time() - began)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(done.stdout) for done in runs) < 0.150
