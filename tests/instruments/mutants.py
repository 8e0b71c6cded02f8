"""Mutation testing: faults that nobody chose, made by cosmic-ray, and who sees them: `llama-oracle verify`, or the tests.

    tox -e mutants [-- --count 300 --seed 0 --out mutants.json --scope engine/]

Places are drawn by the seed from the files of `SCOPE`, each as likely as any other, and of each place one of its mutations.
Type annotations are left out: nothing evaluates them. A mutant is written into a copy of the tree and judged by
`llama-oracle verify` alone, on tiny models and under the plans in which its file runs; then, if that agrees, by the tests that
run its line. Who does not end in time has seen it. The file that is written is also where the next run goes on, and beside it
stands what ran where (`.plans.json`, `.tests.json`), which is measured once.

All is asked in forks of one warm process (`tests.instruments.warm`). A plan or a test that never runs the line of a mutant is
not asked: it could not see it. For what `verify` cannot see by its nature there are rules that look at the source and at what
ran, and at no mutant's fate; see `hidden`. The score is told of all mutants and of those that `verify` could see.

Printed are the scores, and every survivor with its place and its line. On one core a mutant takes 2 to 30 s.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

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
from tests.instruments.warm import Answer, Question, Warm
from tests.ref.lora_files import write_adapter
from tests.ref.quantised_files import write as write_quantised

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
COPIED = ("llama_fast", "llama_ref", "oracle", "tests", "docs", "conftest.py", "pyproject.toml", "tox.ini", "README.md")
LEAST_SECONDS, TIMES_AS_LONG = 25, 6
"""How long a mutant may take: some seconds, and several times as long as the same question without one."""
PROCESSOR_SECONDS, COMPILED_SECONDS, TESTS_SECONDS = 60, 180, 300
"""Of the processor: a plan takes 5 to 12 s, one that is compiled 35."""
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
COMPILED_INT8 = "--model tiny --encoding int8 --compile"
COMPILED_DENSE = "--model tiny --dtype bfloat16 --compile"
COMPILED_BLOCKS = "--model blocks.gguf --compile"
ONLY = {DRAFT: ["acceptance law", "float32 ngram"]}
"""Parts that no other plan asks: the rest of a draft's run is that of the same plan without it. The law of rounds is left out,
which takes as long as all else."""
PAGED = "--model tiny --cache paged"
WINDOW = "--model window --cache growing"
BIASES = "--model biases --projections separate"
ENGINE_TESTS = "tests/fast/engine tests/fast/test_api.py tests/fast/speculative/test_speculative.py tests/fast/grammars"
ENCODING_TESTS = (
    "tests/fast/encodings tests/fast/calibration tests/leaves tests/fast/test_stored_gguf.py tests/fast/test_build.py"
)
CACHE_TESTS = "tests/fast/test_llama.py tests/fast/engine tests/leaves tests/fast/test_build.py"
MODEL_TESTS = "tests/fast/model tests/fast/test_llama.py tests/fast/test_build.py tests/fast/test_adapter.py"


def encoded(*names: str) -> list[str]:
    return [f"--model tiny --dtype bfloat16 --encoding {name}" for name in names]


def ranked(name: str) -> str:
    return f"{RANKS} --encoding {name}"


SCOPE: dict[str, tuple[list[str], str]] = {
    "model/rope.py": (
        [DENSE, "--model llama3", "--model yarn", "--model linear", "--model dynamic"],
        f"{MODEL_TESTS} tests/ref/test_rope_fields.py",
    ),
    "model/matvec.py": (
        [DENSE, BLOCKS, COMPILED, COMPILED_INT8, COMPILED_DENSE],
        f"{MODEL_TESTS} tests/fast/compilers/test_compiled.py",
    ),
    "model/tiles.py": ([COMPILED, COMPILED_INT8], MODEL_TESTS),
    "model/matrices.py": ([DENSE, GROWING, INT8, ADAPTER, BIASES, ORDER], MODEL_TESTS),
    "model/attention.py": ([DENSE, WINDOW, COMPILED], f"{MODEL_TESTS} tests/fast/compilers/test_compiled.py"),
    "model/": ([DENSE, GROWING, INT8, BIASES, WINDOW], MODEL_TESTS),
    "engine/sampling.py": ([DENSE, DRAFT], ENGINE_TESTS),
    "engine/request.py": ([DENSE, DRAFT], ENGINE_TESTS),
    "engine/engine.py": ([DENSE, PAGED, DRAFT], ENGINE_TESTS),
    "engine/steps.py": ([DENSE, PAGED, DRAFT], ENGINE_TESTS),
    "engine/transfer.py": ([DENSE, DRAFT], ENGINE_TESTS),
    "engine/room.py": ([DENSE, PAGED], ENGINE_TESTS),
    "engine/pages.py": ([PAGED], ENGINE_TESTS),
    "engine/caches.py": ([DENSE, PAGED, GROWING], ENGINE_TESTS),
    "encodings/int8.py": ([INT8, ranked("int8")], ENCODING_TESTS),
    "encodings/int8_groups.py": ([*encoded("int8-g32-zero"), ORDER], ENCODING_TESTS),
    "encodings/whole_numbers.py": (
        [*encoded("int8-g32-zero", "int4", "int4-g32-zero"), ORDER, ranked("int4-g32")],
        ENCODING_TESTS,
    ),
    "encodings/int4.py": (encoded("int4", "int4-g32-zero"), ENCODING_TESTS),
    "encodings/grid.py": (encoded("int4", "int4-g32-zero", "int8-g32"), ENCODING_TESTS),
    "encodings/fp8.py": ([*encoded("fp8", "fp8-g128"), ranked("fp8-g32")], ENCODING_TESTS),
    "encodings/sparse24.py": (
        [*encoded("sparse24", "sparse24-int8"), ranked("sparse24-int8")],
        ENCODING_TESTS,
    ),
    "encodings/scales.py": (encoded("int8", "int4-g32-zero", "fp8"), ENCODING_TESTS),
    "encodings/cutting.py": ([ranked("int4-g32")], ENCODING_TESTS + " tests/fast/parallel"),
    "encodings/decoding.py": ([*encoded("int4"), BLOCKS], ENCODING_TESTS),
    "encodings/ggml.py": ([BLOCKS, COMPILED_BLOCKS], ENCODING_TESTS),
    "encodings/stored.py": ([BLOCKS], ENCODING_TESTS),
    "encodings/halves.py": ([BLOCKS, *encoded("int4")], ENCODING_TESTS),
    "encodings/ordered.py": ([ORDER], ENCODING_TESTS),
    "encodings/tiled.py": ([COMPILED, COMPILED_INT8], ENCODING_TESTS),
    "encodings/": ([DENSE, INT8, *encoded("int4-g32")], ENCODING_TESTS),
    "caches/growing.py": ([GROWING, WINDOW], CACHE_TESTS),
    "caches/paged.py": ([PAGED], CACHE_TESTS),
    "caches/": ([DENSE, GROWING], CACHE_TESTS),
    "parallel/": ([DENSE, RANKS], "tests/fast/parallel tests/parallel"),
}
"""By the beginning of a path below llama_fast, the first that fits: what `verify` is told, and the tests that cover it."""


@dataclass(frozen=True)
class Mutant:
    """One mutation at one place, and its fate: seen by "verify", by "tests", or by "" (nobody); "untested": not by verify.

    `hidden`: the rule by which `verify` cannot see it.
    """

    file: str
    line: int
    column: int
    operator: str
    occurrence: int
    hidden: str = ""
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
                mutant = Mutant(path.relative_to(ROOT).as_posix(), *start, name, occurrence)
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
        "linear": RopeScaling("linear", 4.0),
        "dynamic": RopeScaling("dynamic", 2.0),
    }
    configs = {name: replace(SHAPE, rope_scaling=scaling) for name, scaling in scalings.items()}
    configs["window"] = replace(SHAPE, window=24)
    configs["biases"] = replace(SHAPE, attention_bias=True, mlp_bias=True, tie_embeddings=True)
    for name, config in configs.items():
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


@dataclass(frozen=True)
class Ran:
    """What ran without any mutant: by plan and by test the lines of each file, and how long each took."""

    plans: dict[str, dict[str, list[int]]]
    tests: dict[str, dict[str, dict[str, list[str]]]]
    seconds: dict[str, float]

    def plans_measured(self, ask: Callable[[Question], Answer], models: Path, file: Path, processes: int) -> None:
        """From the file, and what is not there asked and written there."""
        if file.exists():
            lines, seconds = json.loads(file.read_text())
            self.plans.update(lines)
            self.seconds.update(seconds)

        def measure(words: str) -> None:
            asked = Question(verify=placed(words, models), seconds=1500, cover=True, only=ONLY.get(words, []))
            answer = innocent(words, ask(asked))
            self.plans[words] = {name: sorted(map(int, of_file)) for name, of_file in answer.lines.items()}
            self.seconds[words] = answer.seconds
            file.write_text(json.dumps([self.plans, {words: self.seconds[words] for words in self.plans}]))
            print(f"{words}: {answer.seconds} s", flush=True)

        wanted = dict.fromkeys(words for plans, _ in SCOPE.values() for words in plans)
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(measure, [words for words in wanted if words not in self.plans]))

    def tests_measured(self, warm: Warm, file: Path) -> None:
        """From the file, or asked and written there."""
        if not file.exists():
            lines: dict[str, dict[str, dict[str, list[str]]]] = {}
            seconds: dict[str, float] = {}
            for path in dict.fromkeys(path for _, tests in SCOPE.values() for path in tests.split()):
                answer = innocent(path, warm.ask(Question(tests=[path], seconds=1200, cover=True)))
                lines[path] = answer.lines
                for line in answer.output.splitlines():
                    words = line.split(maxsplit=2)
                    if len(words) == 3 and words[1] in ("call", "setup") and words[0].endswith("s"):
                        seconds[words[2]] = seconds.get(words[2], 0) + float(words[0][:-1])
                print(f"{path}: {answer.seconds} s", flush=True)
            file.write_text(json.dumps([lines, seconds]))
        lines, seconds = json.loads(file.read_text())
        self.tests.update(lines)
        self.seconds.update(seconds)

    def plan_runs(self, words: str, file: str, lines: range) -> bool:
        return any(line in lines for line in self.plans[words].get(file, ()))

    def tests_of(self, paths: str, file: str, lines: range) -> list[str]:
        """Those that run one of these lines, the quickest first; whole files where the line runs as they are imported."""
        found: dict[str, float] = {}
        for path in paths.split():
            of_file = self.tests[path].get(file, {})
            for test in {test for line in lines for test in of_file.get(str(line), ())}:
                found[test or path] = self.seconds.get(test, 0.0) if test else 1e9
        return sorted(found, key=lambda test: (found[test], test))


def placed(words: str, models: Path) -> str:
    return " ".join(str(models / word) if (models / word).exists() else word for word in words.split())


def innocent(words: str, answer: Answer) -> Answer:
    if answer.code != 0:
        sys.exit(f"{words} ends with {answer.code} without a mutant: {failure_in(answer.output)}")
    return answer


def failure_in(output: str) -> str:
    """The line that tells most of what failed."""
    lines = [line.strip() for line in output.splitlines()]
    marks = ("FAIL", "FAILED", "ERROR", "llama-oracle:", "----")
    return next((line for line in lines if line.startswith(marks)), lines[-1] if lines else "")[:160]


@cache
def parents(file: str) -> dict[ast.AST, ast.AST]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def around(mutant: Mutant) -> list[ast.AST]:
    """The nodes that hold the mutant's place, the innermost first."""
    place = mutant.line, mutant.column
    holding = [
        node
        for node in parents(mutant.file)
        if isinstance(node, ast.stmt | ast.expr | ast.ExceptHandler)
        and (node.lineno, node.col_offset) <= place < (node.end_lineno or 0, node.end_col_offset or 0)
    ]
    return sorted(holding, key=lambda node: (-node.lineno, -node.col_offset, node.end_lineno, node.end_col_offset))


def statement_lines(mutant: Mutant) -> range:
    """The lines of the statement that holds the place; of one with a body those of its head."""
    inner = [node for node in around(mutant) if isinstance(node, ast.stmt)]
    if not inner:
        return range(mutant.line, mutant.line + 1)
    first, body = inner[0], getattr(inner[0], "body", None)
    last = body[0].lineno - 1 if body else (first.end_lineno or first.lineno)
    return range(min(first.lineno, mutant.line), max(last, first.lineno, mutant.line) + 1)


def hidden(mutant: Mutant, ran: Ran) -> str:
    """Why `verify` cannot see it, by rules that ask neither what it changes nor whether somebody saw it; "" where it could.

    * "not run": no plan of the instrument runs its statement (a GPU's branch; an answer to bad input).
    * "refusal": inside a `raise`, or in the condition of an `if` or an `assert` that does nothing but refuse. `verify` gives
      no input that is to be refused.
    * "words": inside what `__str__` or `__repr__` says, or of a message to whoever waits for ranks (`fail`, `explained`,
      `first_line` of `parallel/ranks.py`).
    """
    lines, nodes = statement_lines(mutant), around(mutant)
    if not any(ran.plan_runs(words, mutant.file, lines) for words in ran.plans):
        return "not run"
    above = parents(mutant.file)
    for node in nodes:
        parent = above.get(node)
        if isinstance(node, ast.Raise | ast.Assert):
            return "refusal"
        if isinstance(parent, ast.If) and node is parent.test and isinstance(parent.body[-1], ast.Raise):
            return "refusal"
        if isinstance(node, ast.FunctionDef) and node.name in (
            "__str__",
            "__repr__",
            "fail",
            "explained",
            "first_line",
        ):
            return "words"
    return ""


class Judge:
    """Asks who sees a mutant."""

    def __init__(self, warm: Warm, tree: Path, models: Path, ran: Ran):
        self.warm, self.tree, self.models, self.ran = warm, tree, models, ran

    def verify(self, mutant: Mutant) -> Mutant:
        """Its fate before `verify` alone, under the plans of its file that run its line; if none does, under two that do."""
        lines = statement_lines(mutant)
        runs = [words for words in self.ran.plans if self.ran.plan_runs(words, mutant.file, lines)]
        asked = [words for words in judges_of(mutant.file)[0] if words in runs] or runs[:2]
        asked = asked if asked else judges_of(mutant.file)[0][:1]
        return self._asked(mutant, "verify", {words: self._of_plan(words, mutant) for words in asked}, "untested")

    def test(self, mutant: Mutant) -> Mutant:
        """Its fate before the tests; what runs in processes of its own, as ranks do, before all of its file's."""
        paths = judges_of(mutant.file)[1]
        tests = self.ran.tests_of(paths, mutant.file, statement_lines(mutant))
        if "/parallel/" in mutant.file or not tests:
            tests = [*(test for test in tests if "::" in test), *paths.split()]
        tests = list(dict.fromkeys(tests))
        question = Question(tests=tests, seconds=4 * TESTS_SECONDS, processor_seconds=TESTS_SECONDS)
        return self._asked(mutant, "tests", {f"{len(tests)} tests": question}, "")

    def _of_plan(self, words: str, mutant: Mutant) -> Question:
        seconds = LEAST_SECONDS + TIMES_AS_LONG * self.ran.seconds[words]
        only, loops_last = ONLY.get(words, []), "/engine/" not in mutant.file and "--ranks" not in words
        return Question(
            placed(words, self.models),
            seconds=seconds,
            processor_seconds=COMPILED_SECONDS if "--compile" in words else PROCESSOR_SECONDS,
            only=only,
            loops_last=loops_last,
        )

    def _asked(self, mutant: Mutant, who: str, questions: dict[str, Question], nobody: str) -> Mutant:
        began, seen_by, how = time.monotonic(), nobody, ""
        with planted(mutant, self.tree) as told:
            for words, question in questions.items():
                answer = self.warm.ask(question)
                if answer.code != 0:
                    seen_by, how = who, f"{answer.code}, {words}: {failure_in(answer.output)}"
                    break
        seconds = round(mutant.seconds + time.monotonic() - began, 1)
        return replace(mutant, told=told, seen_by=seen_by, how=how, seconds=seconds)


def report(mutants: Sequence[Mutant]) -> None:
    for folder in sorted({mutant.file.rsplit("/", 1)[0] for mutant in mutants}):
        _score(folder, [mutant for mutant in mutants if mutant.file.rsplit("/", 1)[0] == folder])
    _score("all", mutants)
    for mutant in sorted(mutants, key=lambda mutant: (mutant.seen_by, mutant.hidden, mutant.file, mutant.line)):
        if mutant.seen_by != "verify":
            fate = f"{mutant.seen_by or 'SURVIVES':8} {mutant.hidden:8}"
            print(f"{fate} {mutant.file}:{mutant.line}: {mutant.told}  ({mutant.operator}) {mutant.how}")


def _score(name: str, mutants: Sequence[Mutant]) -> None:
    visible = [mutant for mutant in mutants if not mutant.hidden]
    alone, of_visible = (sum(mutant.seen_by == "verify" for mutant in each) for each in (mutants, visible))
    tests, untested = (sum(mutant.seen_by == who for mutant in mutants) for who in ("tests", "untested"))
    n, rules = len(mutants), sorted({mutant.hidden for mutant in mutants} - {""})
    told = ", ".join(f"{sum(mutant.hidden == rule for mutant in mutants)} {rule}" for rule in rules)
    print(f"{name}: verify alone sees {of_visible} of {len(visible)} that it could", end=" ")
    print(f"({of_visible / max(1, len(visible)):.1%}), {alone} of all {n} ({alone / n:.1%}),", end=" ")
    print(f"with the tests {alone + tests} ({(alone + tests) / n:.1%})", end="")
    print(f"; {untested} before no test yet" * bool(untested) + f"; hidden: {told}" * bool(told))


def copied(tree: Path) -> Path:
    """A copy of the repository to plant mutants in."""
    tree.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tree / name)
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scope", default="", help="the beginning of paths below llama_fast: engine/")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after so long")
    parser.add_argument("--processes", type=int, default=1, help="mutants that are judged at once")
    parser.add_argument("--no-tests", action="store_true", help="ask `verify` alone")
    parser.add_argument(
        "--again", action="store_true", help="ask once more those that somebody else than verify saw, or nobody"
    )
    asked = parser.parse_args()
    began = time.monotonic()
    known = [Mutant(**one) for one in json.loads(asked.out.read_text())] if asked.out.exists() else []
    fates = {one.key: one for one in known if not asked.again or one.seen_by == "verify"}
    wanted, ran = drawn(asked.count, asked.seed, asked.scope), Ran({}, {}, {})
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        models = folder / "models"
        models.mkdir()
        write_models(models)
        idle: SimpleQueue[Judge] = SimpleQueue()
        for number in range(asked.processes):
            tree = copied(folder / f"tree{number}")
            idle.put(Judge(stack.enter_context(Warm(tree)), tree, models, ran))

        def by_idle(do: Callable[[Judge], T]) -> T:
            judge = idle.get()
            try:
                return do(judge)
            finally:
                idle.put(judge)

        ran.plans_measured(
            lambda question: by_idle(lambda judge: judge.warm.ask(question)),
            models,
            asked.out.with_suffix(".plans.json"),
            asked.processes,
        )
        if not asked.no_tests:
            by_idle(lambda judge: ran.tests_measured(judge.warm, asked.out.with_suffix(".tests.json")))
        steps: list[tuple[str, Callable[[Judge, Mutant], Mutant]]] = [
            ("unasked", Judge.verify),
            ("untested", Judge.test),
        ]
        for state, ask in steps[: 1 if asked.no_tests else 2]:
            todo = [one for one in (fates.get(each.key, each) for each in wanted) if one.seen_by == state]

            def one_more(mutant: Mutant, ask: Callable[[Judge, Mutant], Mutant] = ask, count: int = len(todo)) -> None:
                if time.monotonic() - began > 60 * asked.minutes:
                    return
                last = fates[mutant.key] = by_idle(lambda judge: ask(judge, mutant))
                asked.out.write_text(json.dumps([asdict(one) for one in list(fates.values())], indent=1) + "\n")
                told = f"{last.seen_by or 'SURVIVES'} {last.hidden} {last.file}:{last.line} {last.told}"
                print(f"of {count}: {told} ({last.seconds} s)", flush=True)

            with ThreadPoolExecutor(asked.processes) as pool:
                list(pool.map(one_more, todo))
    judged = [fates[each.key] for each in wanted if each.key in fates]
    report([replace(mutant, hidden=hidden(mutant, ran)) for mutant in judged])


if __name__ == "__main__":
    main()
