"""Mutation testing: faults that nobody chose, made by cosmic-ray, and who sees them: `llama-oracle verify`, or the tests.

    tox -e mutants [-- --count 300 --seed 0 --out mutants.json --scope engine/]

Places are drawn by the seed from the files of `SCOPE`, each as likely as any other, and of each place one of its mutations.
Type annotations are left out: nothing evaluates them. A mutant is written into a copy of the tree and judged by
`llama-oracle verify` alone, on tiny models and under the plans in which its file runs; then, if that agrees, by the tests that
cover the file. Who does not end in time has seen it. The file that is written is also where the next run goes on.

Printed are both scores, and every survivor with its place and its line. On two cores a mutant takes 10 to 60 s.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from llama_fast.plan import Plan
from llama_fast.weights import named_tensors
from llama_ref.checkpoint import random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.rope_scaling import RopeScaling
from tests.fast.test_stored_gguf import model as gguf_model
from tests.ref.lora_files import write_adapter
from tests.ref.quantised_files import write as write_quantised

ROOT = Path(__file__).parents[2]
COPIED = ("llama_fast", "llama_ref", "oracle", "tests", "docs", "conftest.py", "pyproject.toml", "tox.ini", "README.md")
VERIFY_SECONDS, TESTS_SECONDS = 300, 600
SHAPE = LlamaConfig(128, 2, 8, 2, 32, 384, 257, 256)

DENSE = "--model tiny --dtype bfloat16"
GROWING = "--model tiny --dtype bfloat16 --cache growing --projections separate"
INT8 = "--model tiny --dtype bfloat16 --encoding int8"
RANKS = "--model tiny --ranks 2"
DRAFT = "--model tiny --draft ngram"
BLOCKS = "--model blocks.gguf --dtype bfloat16"
ADAPTER = "--model tiny --encoding int8 --adapter lora"
ORDER = "--model order --dtype bfloat16"
COMPILED = "--model tiny --encoding int4 --compile"
ENGINE_TESTS = "tests/fast/engine tests/fast/test_api.py tests/fast/speculative/test_speculative.py"
ENCODING_TESTS = (
    "tests/fast/encodings tests/fast/calibration tests/leaves tests/fast/test_stored_gguf.py tests/fast/test_build.py"
)
MODEL_TESTS = "tests/fast/model tests/fast/test_llama.py tests/fast/test_build.py tests/fast/test_adapter.py"


def encoded(*names: str) -> list[str]:
    return [f"--model tiny --dtype bfloat16 --encoding {name}" for name in names]


SCOPE: dict[str, tuple[list[str], str]] = {
    "model/rope.py": ([DENSE, "--model llama3", "--model yarn"], f"{MODEL_TESTS} tests/ref/test_rope_fields.py"),
    "model/matvec.py": ([DENSE, BLOCKS, COMPILED], f"{MODEL_TESTS} tests/fast/compilers/test_compiled.py"),
    "model/tiles.py": ([COMPILED], MODEL_TESTS),
    "model/matrices.py": ([DENSE, GROWING, INT8, ADAPTER], MODEL_TESTS),
    "model/": ([DENSE, GROWING, INT8], MODEL_TESTS),
    "engine/sampling.py": ([DENSE], ENGINE_TESTS),
    "engine/request.py": ([DENSE, DRAFT], ENGINE_TESTS),
    "engine/engine.py": ([DENSE, DRAFT], ENGINE_TESTS),
    "engine/steps.py": ([DENSE, DRAFT], ENGINE_TESTS),
    "engine/transfer.py": ([DENSE, DRAFT], ENGINE_TESTS),
    "encodings/int8.py": ([INT8, RANKS + " --encoding int8"], ENCODING_TESTS),
    "encodings/int8_groups.py": ([*encoded("int8-g32-zero"), ORDER], ENCODING_TESTS),
    "encodings/int4.py": (encoded("int4", "int4-g32-zero"), ENCODING_TESTS),
    "encodings/fp8.py": (encoded("fp8", "fp8-g128"), ENCODING_TESTS),
    "encodings/sparse24.py": (encoded("sparse24", "sparse24-int8"), ENCODING_TESTS),
    "encodings/scales.py": (encoded("int8", "int4-g32-zero", "fp8"), ENCODING_TESTS),
    "encodings/cutting.py": ([RANKS + " --encoding int4-g32"], ENCODING_TESTS + " tests/fast/parallel"),
    "encodings/ggml.py": ([BLOCKS], ENCODING_TESTS),
    "encodings/stored.py": ([BLOCKS], ENCODING_TESTS),
    "encodings/halves.py": ([BLOCKS], ENCODING_TESTS),
    "encodings/ordered.py": ([ORDER], ENCODING_TESTS),
    "encodings/tiled.py": ([COMPILED], ENCODING_TESTS),
    "encodings/": ([DENSE, INT8, *encoded("int4-g32")], ENCODING_TESTS),
    "caches/growing.py": ([GROWING], "tests/fast/test_llama.py tests/fast/engine tests/leaves"),
    "caches/": ([DENSE, GROWING], "tests/fast/test_llama.py tests/fast/engine tests/leaves"),
    "parallel/": ([DENSE, RANKS], "tests/fast/parallel tests/parallel"),
}
"""By the beginning of a path below llama_fast, the first that fits: what `verify` is told, and the tests that cover it."""


@dataclass(frozen=True)
class Mutant:
    """One mutation at one place, and its fate: seen by "verify", by "tests", or by "" (nobody)."""

    file: str
    line: int
    operator: str
    occurrence: int
    told: str = ""
    seen_by: str = "unasked"
    how: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, int]:
        return self.file, self.operator, self.occurrence


def judges_of(file: str) -> tuple[list[str], str]:
    """What judges a file of llama_fast."""
    return next(judges for start, judges in SCOPE.items() if file.removeprefix("llama_fast/").startswith(start))


def files(scope: str) -> list[Path]:
    found = {path for start in SCOPE for path in (ROOT / "llama_fast").rglob("*.py") if below(path).startswith(start)}
    return sorted(path for path in found if below(path).startswith(scope))


def below(path: Path) -> str:
    return path.relative_to(ROOT / "llama_fast").as_posix()


def annotated(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end: (line, column) each."""
    for node in ast.walk(ast.parse(source)):
        found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for one in found:
            if isinstance(one, ast.expr) and one.end_lineno is not None and one.end_col_offset is not None:
                yield (one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)


def places(path: Path) -> dict[tuple[tuple[int, int], tuple[int, int]], list[Mutant]]:
    """A file's places, and the mutations of each."""
    source = path.read_text(encoding="utf-8")
    hidden, nodes = list(annotated(source)), list(ast_nodes(get_ast(source)))
    found: dict[tuple[tuple[int, int], tuple[int, int]], list[Mutant]] = {}
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if operator.arguments():  # it wants names of variables
            continue
        at = [place for node in nodes for place in operator().mutation_positions(node)]
        for occurrence, (start, end) in enumerate(at):
            if not any(a <= start and end <= b for a, b in hidden):
                mutant = Mutant(path.relative_to(ROOT).as_posix(), start[0], name, occurrence)
                found.setdefault((start, end), []).append(mutant)
    return found


def drawn(count: int, seed: int, scope: str) -> list[Mutant]:
    """So many places of all files in the scope, and a mutation of each."""
    draw = random.Random(seed)
    everywhere = [mutants for path in files(scope) for _, mutants in sorted(places(path).items())]
    print(f"{len(everywhere)} places, {sum(map(len, everywhere))} mutants; {min(count, len(everywhere))} are drawn")
    return [draw.choice(mutants) for mutants in draw.sample(everywhere, min(count, len(everywhere)))]


def write_models(folder: Path) -> None:
    """The models by the names that SCOPE has for them."""
    scalings = {
        "tiny": None,
        "llama3": RopeScaling("llama3", 8.0, original_context=64),
        "yarn": RopeScaling("yarn", 4.0, original_context=64, beta_fast=8.0),
    }
    for name, scaling in scalings.items():
        config = replace(SHAPE, rope_scaling=scaling)
        tensors = dict(named_tensors(random_checkpoint(config, 1), Plan(), None, torch.device("cpu")))
        save_checkpoint(folder / name, config, tensors, "dense")
    first = {"attn_q": "q4_1", "attn_k": "iq4_nl", "attn_v": "q6_k", "attn_output": "iq4_xs"}
    first |= {"ffn_gate": "mxfp4", "ffn_up": "q4_0", "ffn_down": "q5_k"}
    second = {"attn_q": "q5_0", "attn_k": "q3_k", "attn_v": "q2_k", "attn_output": "q5_1", "ffn_down": "f16"}
    mixed = {f"blk.{i}.{name}": kind for i, kinds in enumerate((first, second)) for name, kind in kinds.items()}
    mixed |= {"output": "q8_0"}
    gguf_model(folder / "blocks.gguf", "q4_k", mixed)
    write_quantised(folder / "order", "gptq-order")
    write_adapter(folder / "lora", SHAPE, ("q_proj", "o_proj", "up_proj"))  # of what is joined, some have none


def ended(words: Sequence[str], tree: Path, seconds: float) -> tuple[int | None, str]:
    """Exit code (None: it did not end in time) and output of a command in a tree."""
    paths = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        words,
        cwd=tree,
        env=os.environ | paths,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = child.communicate(timeout=seconds)
        return child.returncode, out
    except subprocess.TimeoutExpired:
        return None, "not ended in time"
    finally:  # with all that it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def verified(told: str, tree: Path, models: Path) -> tuple[int | None, str]:
    words = [str(models / word) if (models / word).exists() else word for word in told.split()]
    return ended([sys.executable, "-m", "oracle", "verify", "--device", "cpu", *words], tree, VERIFY_SECONDS)


def tested(paths: str, tree: Path) -> tuple[int | None, str]:
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths.split()]
    return ended(words, tree, TESTS_SECONDS)


def failure_in(output: str) -> str:
    """The line that tells most of what failed."""
    lines = [line.strip() for line in output.splitlines()]
    marks = ("FAIL", "FAILED", "ERROR", "llama-oracle:", "----")
    return next((line for line in lines if line.startswith(marks)), lines[-1] if lines else "")[:160]


@contextlib.contextmanager
def planted(mutant: Mutant, tree: Path) -> Iterator[str]:
    """The mutant in the tree, and its line; afterwards the file is what it was, with the time that compiled code goes by."""
    path = tree / mutant.file
    source, kept = path.read_text(encoding="utf-8"), path.stat()
    changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None, mutant
    lines = zip(source.splitlines(), changed.splitlines())
    path.write_text(changed, encoding="utf-8")
    try:
        yield next((b for a, b in lines if a != b), "a line is gone").strip()
    finally:
        path.write_text(source, encoding="utf-8")
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


def judged(mutant: Mutant, tree: Path, models: Path, innocent: set[str]) -> Mutant:
    """The mutant with its fate. `innocent`: commands that pass without any, which is asked of each once."""
    plans, tests = judges_of(mutant.file)
    began, seen_by, how = time.perf_counter(), "", ""
    for words in [*plans, tests]:
        is_tests = words == tests
        ask = partial(tested, tests, tree) if is_tests else partial(verified, words, tree, models)
        if words not in innocent:
            code, output = ask()
            if code != 0:
                sys.exit(f"{words} ends with {code} without a mutant: {failure_in(output)}")
            innocent.add(words)
        with planted(mutant, tree) as told:
            code, output = ask()
        if code != 0:
            seen_by, how = "tests" if is_tests else "verify", f"{code}, {words}: {failure_in(output)}"
            break
    return replace(mutant, told=told, seen_by=seen_by, how=how, seconds=round(time.perf_counter() - began, 1))


def report(mutants: Sequence[Mutant]) -> None:
    for folder in sorted({mutant.file.rsplit("/", 1)[0] for mutant in mutants}):
        of_folder = [mutant for mutant in mutants if mutant.file.rsplit("/", 1)[0] == folder]
        _score(folder, of_folder)
    _score("all", mutants)
    for mutant in sorted(mutants, key=lambda mutant: (mutant.seen_by, mutant.file, mutant.line)):
        if mutant.seen_by != "verify":
            print(f"{mutant.seen_by or 'SURVIVES':8} {mutant.file}:{mutant.line}: {mutant.told}  ({mutant.operator})")


def _score(name: str, mutants: Sequence[Mutant]) -> None:
    alone = sum(mutant.seen_by == "verify" for mutant in mutants)
    tests = sum(mutant.seen_by == "tests" for mutant in mutants)
    n = len(mutants)
    print(f"{name}: {alone} of {n} seen by verify alone ({alone / n:.1%}), {alone + tests} with the tests", end=" ")
    print(f"({(alone + tests) / n:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scope", default="", help="the beginning of paths below llama_fast: engine/")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after so long")
    asked = parser.parse_args()
    began = time.monotonic()
    done = [Mutant(**one) for one in json.loads(asked.out.read_text())] if asked.out.exists() else []
    wanted = drawn(asked.count, asked.seed, asked.scope)
    left = [mutant for mutant in wanted if mutant.key not in {one.key for one in done}]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree, models = Path(folder) / "tree", Path(folder) / "models"
        tree.mkdir()
        models.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, tree / name)
        write_models(models)
        innocent: set[str] = set()
        for number, mutant in enumerate(left):
            if time.monotonic() - began > 60 * asked.minutes:
                break
            done.append(judged(mutant, tree, models, innocent))
            asked.out.write_text(json.dumps([asdict(one) for one in done], indent=1) + "\n")
            last = done[-1]
            print(
                f"{number + 1}/{len(left)} {last.seen_by or 'SURVIVES'} {last.file}:{last.line} {last.told}", flush=True
            )
    report(done)


if __name__ == "__main__":
    main()
