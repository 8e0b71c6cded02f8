"""What the house promises of its own plan: one forward pass, seams that nobody goes around, leaves that can be taken away."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_fast.recipes import encodings

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "llama_fast").rglob("*.py"))
LEAF_CLASSES = {
    "arithmetic": {"PyTorch", "Operators", "Triton", "Kernels"},
    "caches": {"Growing", "GrowingCache", "GrowingLayer", "Static", "StaticCache", "StaticLayer", "Paged", "PagedCache"}
    | {"PagedLayer"},
    "encodings": {"Dense", "Int8"},
    "compilers": {"Eager", "Compiled", "Graphed"},
    "model": {"Matrix", "Table", "Separate", "Joined", "SplitHead"},
}
"""Classes that only their own folder may ask for by `isinstance`."""


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def runs_blocks(function: ast.FunctionDef) -> bool:
    """Whether a function goes through a model's blocks and calls each."""
    for loop in ast.walk(function):
        if isinstance(loop, ast.For) and "blocks" in {
            n.attr for n in ast.walk(loop.iter) if isinstance(n, ast.Attribute)
        }:
            names = {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}
            calls = (n.func for n in ast.walk(loop) if isinstance(n, ast.Call))
            if any(isinstance(called, ast.Name) and called.id in names for called in calls):
                return True
    return False


def test_there_is_one_forward_pass() -> None:
    assert [place for place, function in functions() if runs_blocks(function)] == ["llama_fast/model/llama.py:forward"]


def test_a_block_is_five_operations() -> None:
    (forward,) = [
        f
        for place, f in functions()
        if place == "llama_fast/model/llama.py:forward" and "layer" in {a.arg for a in f.args.args}
    ]
    called = [n.func.attr for n in ast.walk(forward) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    steps = [name for name in called if name in ("qkv", "attend", "add", "gated")]
    assert sorted(steps) == ["add", "add", "attend", "gated", "qkv"]


MOST_PARAMETERS = 6
FACES = {
    "llama_fast/engine/generate.py:generate",  # public, as the two of `Llama`: options that users name
    "llama_fast/engine/engine.py:__init__",
    "llama_fast/llama.py:generate",
    "llama_fast/llama.py:stream",
    "llama_fast/lm_eval_model.py:__init__",  # the evaluation harness calls it
    "llama_fast/ladder/cli.py:generate",  # commands: a parameter is a flag
    "llama_fast/ladder/cli.py:chat",
    "llama_fast/ladder/cli.py:bench",
    "llama_fast/ladder/cli.py:quantize",
    "llama_fast/ladder/cli.py:serve",
}
"""Functions whose parameters are options that somebody outside names. Kernels are launched with numbers, and not counted."""


def test_lists_of_parameters_are_short() -> None:
    long = set()
    for place, function in functions():
        a = function.args
        names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs) if arg.arg not in ("self", "cls")]
        if len(names) > MOST_PARAMETERS and not place.startswith("llama_fast/kernels/"):
            long.add(place)
    assert long == FACES


def calls(node: ast.AST, method: str) -> bool:
    """Whether `something.method(...)` stands in here."""
    return any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == method for n in ast.walk(node)
    )


def owners(node: ast.AST, method: str) -> set[str]:
    """On what a method is called in here: `self.runner.step(...)` -> "runner"."""
    found = (n.func.value for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
             and n.func.attr == method)  # fmt: skip
    return {n.attr if isinstance(n, ast.Attribute) else n.id for n in found if isinstance(n, ast.Attribute | ast.Name)}


def test_there_is_one_loop_that_decodes() -> None:
    """Only the engine launches steps one after another. (A draft model's k proposals of one round are a loop of its own.)"""
    loops = [(place, n) for place, f in functions() for n in ast.walk(f) if isinstance(n, ast.For | ast.While)]
    assert {place for place, loop in loops if calls(loop, "launch")} == {"llama_fast/engine/engine.py:step"}
    stepping = {place for place, loop in loops if owners(loop, "step") & {"runner", "target"}}
    assert stepping == {"llama_fast/speculative/proposers.py:propose"}


def test_one_place_knows_when_a_row_ends() -> None:
    """Whoever sets a reason, or looks for a token among those that end a text."""
    found = set()
    for place, function in functions():
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else []
            compared = node.comparators if isinstance(node, ast.Compare) else []
            named = {n.attr for n in (*targets, *compared) if isinstance(n, ast.Attribute)}
            if named & {"finish_reason", "eos_ids"} and not (compared and named == {"finish_reason"}):
                found.add(place)
    assert found == {f"llama_fast/engine/request.py:{name}" for name in ("__init__", "take", "cancel")} - {
        "llama_fast/engine/request.py:__init__"  # there an annotated None
    }


def test_one_keeper_of_caches() -> None:
    """Caches are made by their keeper, for an engine, and for a score, which is done with its own at once."""
    makers = {place for place, function in functions() if owners(function, "allocate") - {"cache"}}
    assert makers == {
        "llama_fast/engine/caches.py:take",
        "llama_fast/engine/engine.py:__init__",
        "llama_fast/engine/runner.py:score",
        "llama_fast/chat.py:_room_for",  # an engine's
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_asks_for_the_class_of_a_leaf(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[1]
    foreign = set().union(*(classes for of, classes in LEAF_CLASSES.items() if of != folder))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not asked & foreign, f"line {node.lineno}"


WITHOUT = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == {gone!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
import dataclasses, torch
import llama_fast, llama_fast.llama, llama_fast.chat
from llama_fast import Plan, build, generate
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
config = LlamaConfig(48, 2, 6, 2, 10, 72, 101, 64)
plans = [Plan()]
try:
    from llama_fast.recipes import encodings, optimised
    plans += [optimised(kind) for kind in encodings().values()]
except ModuleNotFoundError as error:
    assert str(error) == {gone!r}
runners = [build(random_checkpoint(config, 3), plan, "cpu") for plan in plans[:2]]
texts = {{tuple(generate(runner, [[1, 2, 3]], 5).completions[0].tokens) for runner in runners}}
print(len(plans), "plans,", len(texts), "text")
"""


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("llama_fast.arithmetic.triton", f"{1 + len(encodings())} plans, 1 text"),
        ("llama_fast.compilers.graphed", f"{1 + len(encodings())} plans, 1 text"),
        ("llama_fast.compilers.compiled", f"{1 + len(encodings())} plans, 1 text"),
        ("llama_fast.parallel.tensor_parallel", f"{1 + len(encodings())} plans, 1 text"),
        ("llama_fast.caches.static", "1 plans, 1 text"),
    ],
)
def test_a_leaf_can_be_taken_away(gone: str, said: str) -> None:
    """The library imports, and generates with the leaves that are left."""
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(gone=gone)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == said, done.stdout + done.stderr


def test_a_plan_with_kernels_can_be_named_where_there_is_no_triton() -> None:
    """The ladder names all its rungs on every machine."""
    code = WITHOUT.partition("import dataclasses")[0].format(gone="triton") + (
        "import llama_fast.ladder.rungs, llama_fast.recipes; print(llama_fast.recipes.fused())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "dense · static · triton · graphed · whole · fused projections", done.stderr


def test_an_encoding_can_be_taken_away(tmp_path: Path) -> None:
    """Its file is not there: the others are found, and the name is unknown."""
    import shutil

    for package in ("llama_fast", "llama_ref"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "llama_fast/encodings/int8.py").unlink()
    code = "from llama_fast.recipes import encodings, optimised; optimised(); print(*encodings())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [name for name in encodings() if name != "int8"], done.stdout + done.stderr
