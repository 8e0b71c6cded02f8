"""What callers hand over: of plain meaning it is taken, else one line names the argument, raised by code of ours."""

from __future__ import annotations

import traceback
from collections import UserDict
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llama_fast import Llama, Plan, Sampling, build, generate
from llama_fast.arithmetic.triton import Triton
from llama_fast.caches.static import Static
from llama_fast.chat import Chat
from llama_fast.compilers.compiled import Compiled
from llama_fast.encodings.int8 import Int8
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.recipes import optimised
from llama_fast.speculative.proposers import Draft, Ngram, Padded
from llama_ref.arguments import real, whole
from llama_ref.checkpoint import open_checkpoint, random_checkpoint, save_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.generate import greedy, sample
from llama_ref.model import Llama as Reference
from llama_ref.models import resolve
from llama_ref.tokenizers.tokenizer import RandomTokenizer, load_tokenizer
from oracle.questions.cases import Case, Split, random_row, standard_case
from oracle.questions.judge import Bench, judge
from oracle.subjects.adapters import RefSubject, Yardstick

ROOT = Path(__file__).parents[2]
CONFIG = LlamaConfig(48, 2, 6, 2, 10, 72, 259, 128)
IDS, OTHER = [5, 9, 17], [44, 3, 250, 7]
SAME = [[5, 9, 17], [44, 3, 250]]
"""Two unequal rows of one length, as an array holds them."""


class Letters(RandomTokenizer):
    """A byte is an id; text comes back."""

    def __init__(self) -> None:
        super().__init__(259, None, ())

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


CHECKPOINT = random_checkpoint(CONFIG, 3)
LLAMA = Llama(build(CHECKPOINT, optimised(), "cpu", torch.float32), Letters())
REFERENCE = Reference(CONFIG, CHECKPOINT.weights, torch.float32)
TRUTH = RefSubject(CONFIG, CHECKPOINT.weights, torch.float64)
BENCH = Bench(TRUTH, Yardstick(CONFIG, CHECKPOINT.weights, torch.float32))
CASE = Case(((5, 9, 17), (44, 3, 250, 7)), (Split((1, 2), (3, 4)),), ((5, 9), (44, 3, 250)), 3)

# --- of plain meaning -----------------------------------------------------------------------------

ONE_PROMPT: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(IDS),
    "range": lambda: range(5, 18, 4),
    "generator": lambda: (token for token in IDS),
    "NumPy array": lambda: np.array(IDS),
    "NumPy array of int32": lambda: np.array(IDS, dtype=np.int32),
    "NumPy array of uint16": lambda: np.array(IDS, dtype=np.uint16),
    "NumPy array of objects": lambda: np.array(IDS, dtype=object),
    "NumPy array without room of its own": lambda: np.array([[5, 0], [9, 0], [17, 0]])[:, 0],
    "NumPy numbers": lambda: list(np.array(IDS)),
    "tensors without dimensions": lambda: list(torch.tensor(IDS)),
    "tensor [T]": lambda: torch.tensor(IDS),
    "tensor [T] of int32": lambda: torch.tensor(IDS, dtype=torch.int32),
    "tensor [T] of uint8": lambda: torch.tensor(IDS, dtype=torch.uint8),
    "BatchEncoding": lambda: UserDict(input_ids=IDS, attention_mask=[1, 1, 1]),
}
BATCHES: dict[str, Callable[[], Any]] = {
    "tensor [B, T]": lambda: torch.tensor(SAME),
    "NumPy array [B, T]": lambda: np.array(SAME),
    "tensors [T]": lambda: [torch.tensor(row) for row in SAME],
    "tensors [1, T]": lambda: [torch.tensor([row]) for row in SAME],
    "arrays": lambda: tuple(np.array(row) for row in SAME),
    "generator of rows": lambda: (row for row in SAME),
    "BatchEncoding of tensors": lambda: UserDict(
        input_ids=torch.tensor(SAME), attention_mask=torch.ones(2, 3, dtype=torch.int64)
    ),
    "BatchEncoding without a mask": lambda: UserDict(input_ids=SAME),
    "dict padded left and right": lambda: {
        "input_ids": np.array([[0, 5, 9, 17], [44, 3, 250, 0]]),
        "attention_mask": np.array([[0, 1, 1, 1], [1, 1, 1, 0]]),
    },
    "BatchEncodings": lambda: [UserDict(input_ids=row, attention_mask=[1, 1, 1]) for row in SAME],
    "BatchEncodings of tensors": lambda: [UserDict(input_ids=torch.tensor([row])) for row in SAME],
}


@pytest.mark.parametrize("kind", ONE_PROMPT)
def test_one_prompt_is_taken_whatever_holds_its_ids(kind: str) -> None:
    ids = list(range(5, 18, 4)) if kind == "range" else IDS
    wanted, make = LLAMA.generate(ids, 6), ONE_PROMPT[kind]
    output = LLAMA.generate(make(), 6)
    assert (output.tokens, output.prompt_tokens) == (wanted.tokens, len(ids))
    assert all(type(token) is int for token in LLAMA.encode(make()))
    assert "".join(LLAMA.stream(make(), 6)) == wanted.text
    assert LLAMA.score(make()) == LLAMA.score(ids)
    assert [o.tokens for o in LLAMA.generate([OTHER, make()], 6)] == [LLAMA.generate(OTHER, 6).tokens, wanted.tokens]


@pytest.mark.parametrize("kind", BATCHES)
def test_several_prompts_are_taken_whatever_holds_their_ids(kind: str) -> None:
    wanted = [output.tokens for output in LLAMA.generate(SAME, 6)]
    assert wanted[0] != wanted[1]
    assert [output.tokens for output in LLAMA.generate(BATCHES[kind](), 6)] == wanted
    assert LLAMA.score(BATCHES[kind]()) == LLAMA.score(SAME)


@pytest.mark.parametrize("ids", [torch.tensor([IDS]), np.array([IDS]), UserDict(input_ids=torch.tensor([IDS]))])
def test_an_array_of_one_row_is_one_prompt_where_one_is_wanted_and_else_a_batch_of_one(ids: Any) -> None:
    wanted = LLAMA.generate(IDS, 6)
    assert [output.tokens for output in LLAMA.generate(ids, 6)] == [wanted.tokens]
    assert "".join(LLAMA.stream(ids, 6)) == wanted.text and LLAMA.encode(ids) == IDS


def test_what_a_tokenizer_of_transformers_returns_is_a_prompt(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 5, "b": 9, "c": 17}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for side in ("left", "right"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", padding_side=side)
        for form in ("pt", "np", None):
            given = tokenizer(["a b c", "c a"], padding=True, return_tensors=form)
            assert [o.tokens for o in LLAMA.generate(given, 6)] == [
                o.tokens for o in LLAMA.generate([[5, 9, 17], [17, 5]], 6)
            ]
        assert LLAMA.generate(tokenizer("a b c"), 6).tokens == LLAMA.generate(IDS, 6).tokens
        assert LLAMA.encode(tokenizer("a b c", return_tensors="pt")) == IDS


NUMBERS: list[tuple[str, Any, Any]] = [
    ("max_new_tokens", np.int64(5), 5),
    ("max_new_tokens", torch.tensor(5), 5),
    ("temperature", np.float32(0.5), 0.5),
    ("temperature", torch.tensor(0.5), 0.5),
    ("temperature", np.array(2), 2.0),
    ("temperature", Fraction(1, 2), 0.5),
    ("temperature", Decimal("0.5"), 0.5),
    ("temperature", 1, 1.0),
    ("top_k", np.int64(5), 5),
    ("top_p", np.float64(0.5), 0.5),
    ("min_p", np.float16(0.25), 0.25),
    ("repetition_penalty", np.float32(1.5), 1.5),
    ("frequency_penalty", np.float64(0.5), 0.5),
    ("presence_penalty", np.int64(1), 1.0),
    ("logit_bias", {np.int32(5): np.float16(0.5)}, {5: 0.5}),
    ("logit_bias", None, {}),
    ("seed", np.uint64(2**64 - 1), 2**64 - 1),
    ("seed", torch.tensor(7), 7),
    ("logprobs", np.int32(2), 2),
    ("stop", None, ()),
    ("stop", "e", ("e",)),
    ("stop", ["e"], ("e",)),
    ("stop", (word for word in ["e"]), ("e",)),
    ("stop", np.array(["e"]), ("e",)),
]


@pytest.mark.parametrize(("name", "given", "plain"), NUMBERS, ids=lambda value: str(value)[:30])
def test_an_option_of_plain_meaning_does_what_the_plain_one_does(name: str, given: Any, plain: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.9, "logprobs": 1}
    told, wanted = (LLAMA.generate("a text", **(options | {name: value})) for value in (given, plain))
    assert (told.tokens, told.text) == (wanted.tokens, wanted.text)
    assert told.logprobs == wanted.logprobs


@pytest.mark.parametrize("seeds", [(4, 9), np.array([4, 9]), torch.tensor([4, 9]), (seed for seed in (4, 9))])
def test_several_seeds_are_taken_whatever_holds_them(seeds: Any) -> None:
    told, wanted = (LLAMA.generate(SAME, 6, temperature=1.0, seed=given) for given in (seeds, [4, 9]))
    assert [output.tokens for output in told] == [output.tokens for output in wanted]
    assert hash(Sampling(seed=[4, 9])) == hash(Sampling(seed=(4, 9)))


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_is_taken_by_its_names(dtype: Any, directory: Path) -> None:
    assert Llama.from_pretrained(directory, dtype=dtype, device="cpu").runner.dtype is torch.bfloat16
    assert build(CHECKPOINT, Plan(), "cpu", dtype).dtype is torch.bfloat16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("arguments") / "model"
    save_checkpoint(place, CONFIG, CHECKPOINT.weights, tokenizer=RandomTokenizer(259, None, ()))
    return place


def test_a_model_is_opened_by_whatever_names_it(directory: Path) -> None:
    class Elsewhere:
        def __fspath__(self) -> str:
            return str(directory)

    wanted = Llama.from_pretrained(str(directory), device="cpu").generate(SAME, 6)
    for model in (directory, Elsewhere()):
        for device in ("cpu", torch.device("cpu"), torch.device("cpu", 0)):
            llama = Llama.from_pretrained(model, device=device, dtype="auto")  # type: ignore[arg-type]
            assert llama.runner.dtype is torch.float32
            assert [o.tokens for o in llama.generate(SAME, 6)] == [o.tokens for o in wanted]


def test_a_preset_is_a_plan_by_its_name(directory: Path) -> None:
    by_name = Llama.from_pretrained(directory, "int8", device="cpu")
    assert by_name.runner.plan == optimised(Int8())
    written = Llama.from_pretrained(directory, optimised(Int8()), device="cpu")
    assert [o.tokens for o in by_name.generate(SAME, 6)] == [o.tokens for o in written.generate(SAME, 6)]


def test_the_loop_below_the_face_takes_the_same() -> None:
    wanted = [done.tokens for done in generate(LLAMA.runner, SAME, 6, eos_ids=(7,)).completions]
    for prompts in (np.array(SAME), torch.tensor(SAME), tuple(map(tuple, SAME)), (np.array(row) for row in SAME)):
        for eos in (7, np.int64(7), {7}, [7], torch.tensor([7])):
            done = generate(LLAMA.runner, prompts, np.int64(6), eos_ids=eos)  # type: ignore[arg-type]
            assert [one.tokens for one in done.completions] == wanted
            prompts = SAME


def test_chats_and_proposers_and_the_reference_take_numbers_of_numpy() -> None:
    chat = Chat(LLAMA, None, np.int64(6), stop="e")  # type: ignore[arg-type]
    assert chat.stop == ("e",) and "".join(chat.say("Hi")) == "".join(Chat(LLAMA, None, 6, stop=["e"]).say("Hi"))
    wanted = LLAMA.generate(IDS, 6).tokens
    for draft in (Ngram(np.int64(2), most=np.int64(4)), Draft(LLAMA.runner, np.int64(2))):  # type: ignore[arg-type]
        assert LLAMA.generate(IDS, 6, draft=draft).tokens == wanted
    assert Static(np.int64(64)) == Static(64)  # type: ignore[arg-type]
    assert TensorParallel(np.int64(0), np.int64(2)) == TensorParallel(0, 2)  # type: ignore[arg-type]
    assert greedy(REFERENCE, np.array(IDS), np.int64(6)) == wanted == greedy(REFERENCE, IDS, 6)  # type: ignore[arg-type]


def test_cases_take_arrays() -> None:
    arrays = Case(
        [np.array(row) for row in CASE.rows], list(CASE.splits), [torch.tensor([5, 9]), (44, 3, 250)], np.int64(3)
    )  # type: ignore[arg-type]
    assert arrays == CASE and hash(arrays) == hash(CASE)
    assert Split(np.array([1, 2]), [3, 4]) == CASE.splits[0]  # type: ignore[arg-type]
    assert judge(TRUTH, BENCH, arrays).outcome.name == "AGREE"


# --- of none --------------------------------------------------------------------------------------

NO_WHOLE = [1.5, 5.0, "5", True, None, [5], float("nan"), 1j, b"5", np.bool_(True), np.float64(5), torch.tensor([5, 6])]
NO_NUMBER = ["hot", None, [1.0], 1j, b"1", True, torch.ones(2), np.array(["x"]), 10**400]
NO_PROMPTS = [
    None,
    5,
    1.5,
    b"bytes",
    bytearray(b"x"),
    [None],
    [b"x"],
    [1.5],
    [1, "a"],
    [True, 5],
    [[5, 9.0]],
    [[5], [None]],
]
NO_PROMPTS += [torch.tensor([1.5]), torch.tensor(5), torch.tensor([True]), np.array([0.5]), torch.zeros(1, 1, 2).long()]
NO_PROMPTS += [{"role": "user", "content": "x"}, {5, 9}, object(), [-1], [259], [10**30], "\ud800", ["a", "\udfff"]]
NO_PROMPTS += [torch.zeros(3, device="meta").long(), [{"role": "user", "content": "\ud800"}]]
NO_PROMPTS += [
    {"input_ids": "x"},
    {"input_ids": SAME, "attention_mask": [[1, 1, 1]]},
    {"input_ids": IDS, "attention_mask": [1]},
]
NO_PROMPTS += [[[{"role": "user", "content": "x"}], 5], [5, None], Int8(), lambda: 5, np.array([["a", "b"]])]
EMPTY = [[], [[]], [[], [5]], "", ["a", ""], torch.zeros(0).long(), torch.zeros(2, 0).long(), (), iter(())]

Call = Callable[[Any], Any]
HANDED_OVER: list[tuple[str, Call, list[Any]]] = [
    ("prompt", lambda v: LLAMA.generate(v, 4), [*NO_PROMPTS, *EMPTY]),
    ("prompt", lambda v: LLAMA.stream(v, 4), [*NO_PROMPTS, *EMPTY, SAME, torch.tensor(SAME), ["text"]]),
    ("prompt", LLAMA.encode, NO_PROMPTS),
    ("(texts|prompt)", LLAMA.score, [*NO_PROMPTS, *EMPTY]),
    ("(rows|prompt)", LLAMA.score_ids, [None, 5, "text", IDS, [["a"]], [[1.5]], [[]], [], [[999]], torch.ones(2, 2)]),
    ("max_new_tokens", lambda v: LLAMA.generate("a", v), [*NO_WHOLE, 0, -1]),
    ("max_new_tokens", lambda v: LLAMA.stream("a", v), [*NO_WHOLE, 0, -1]),
    ("max_new_tokens", lambda v: LLAMA.generate("a", v), [10**30, 1000]),
    ("temperature", lambda v: LLAMA.generate("a", 4, temperature=v), [*NO_NUMBER, -1, float("nan"), float("inf")]),
    ("top_k", lambda v: LLAMA.generate("a", 4, top_k=v), [*(v for v in NO_WHOLE if v is not None), 0, -1]),
    ("top_p", lambda v: LLAMA.generate("a", 4, top_p=v), [*NO_NUMBER, 0, 1.5, -1, float("nan")]),
    ("min_p", lambda v: LLAMA.generate("a", 4, min_p=v), [*NO_NUMBER, 1.5, -1, float("nan")]),
    ("repetition_penalty", lambda v: LLAMA.generate("a", 4, repetition_penalty=v), [*NO_NUMBER, 0, -1, 1e300, 1e-300, float("nan")]),
    ("frequency_penalty", lambda v: LLAMA.generate("a", 4, frequency_penalty=v), [*NO_NUMBER, 1e300, float("inf"), float("nan")]),
    ("presence_penalty", lambda v: LLAMA.generate("a", 4, presence_penalty=v), [*NO_NUMBER, -1e300, float("nan")]),
    ("logit_bias", lambda v: LLAMA.generate("a", 4, logit_bias=v), [5, "5", [5], {"5": 1}, {5: "1"}, {-1: 1}, {10**6: 1}, {5: float("nan")}]),
    ("grammar", lambda v: LLAMA.generate("a", 4, grammar=v), ["a+", 5, {"type": "object"}]),
    ("seed", lambda v: LLAMA.generate("a", 4, seed=v), ["x", 1.5, None, True, ["x"], [1.5], b"x", {1}, -1, 2**64, [1, 2], [], {"a": 1}]),
    ("stop", lambda v: LLAMA.generate("a", 4, stop=v), [3, b"x", [3], [b"x"], [None], "", [""], True, {"a": 1}, object(), "\ud800"]),
    ("stop", lambda v: LLAMA.stream("a", 4, stop=v), [3, b"x", [3], "", [""]]),
    ("logprobs", lambda v: LLAMA.generate("a", 4, logprobs=v), [*(v for v in NO_WHOLE if v is not None), -1]),
    ("on_text", lambda v: LLAMA.generate("a", 4, on_text=v), ["print", 5, True]),
    ("draft", lambda v: LLAMA.generate("a", 4, draft=v), ["ngram", 5, Ngram, LLAMA.runner, LLAMA, True]),
    ("draft", lambda v: LLAMA.stream("a", 4, draft=v), ["ngram", 5, Ngram]),
    ("runner", lambda v: Llama(v, Letters()), [None, "model", LLAMA, CHECKPOINT]),
    ("tokenizer", lambda v: Llama(LLAMA.runner, v), [None, "model", Letters]),
    ("model", lambda v: Llama.from_pretrained(v, device="cpu"), [None, 5, b"model", ["a"], True, "", "no such", LLAMA]),
    ("device", lambda v: Llama.from_pretrained("random:smollm2-135m", device=v), ["gpu", "banana", "", b"cpu", 1.5, True, [], "cuda:x", "mps", "meta", "cpu:x"]),
    ("dtype", lambda v: Llama.from_pretrained("random:smollm2-135m", dtype=v), ["float8", "int8", torch.int8, torch.bool, torch.complex64, 16, float, [], b"bf16", torch.tensor(1.0)]),
    ("plan", lambda v: Llama.from_pretrained("random:smollm2-135m", v), ["int7", "", 5, Int8(), Plan, True, {}, []]),
    ("checkpoint", lambda v: build(v, Plan(), "cpu"), [None, "model", Path("model"), CONFIG, type(CHECKPOINT)]),
    ("plan", lambda v: build(CHECKPOINT, v, "cpu"), [None, "int8", Int8(), Plan]),
    ("device", lambda v: build(CHECKPOINT, Plan(), v), ["gpu", 1.5, "meta", "cuda:99"]),
    ("dtype", lambda v: build(CHECKPOINT, Plan(), "cpu", v), ["x", torch.int64, 5, float]),
    ("runner", lambda v: generate(v, SAME, 4), [None, LLAMA, CHECKPOINT, "model"]),
    ("prompts?", lambda v: generate(LLAMA.runner, v, 4), [None, 5, "text", ["text"], IDS, [[1.5]], [[]], [], [[259]], [[-1]], torch.ones(2, 2), b"xx"]),
    ("max_new_tokens", lambda v: generate(LLAMA.runner, SAME, v), [*NO_WHOLE, 0, -1, 1000]),
    ("sampling", lambda v: generate(LLAMA.runner, SAME, 4, v), [None, 0.5, {"temperature": 1}, Sampling, "greedy"]),
    ("eos_ids", lambda v: generate(LLAMA.runner, SAME, 4, eos_ids=v), ["</s>", 2.5, [2.5], ["</s>"], True, b"x", {1.5}]),
    ("cache", lambda v: generate(LLAMA.runner, SAME, 4, cache=v), [5, "static", Static(), Static, LLAMA.runner.allocate(1, 64), LLAMA.runner.allocate(3, 64)]),
    ("cache", lambda v: generate(LLAMA.runner, SAME, 100, cache=v), [build(CHECKPOINT, Plan(cache=Static(32)), "cpu").allocate(2, 32)]),
    ("draft", lambda v: generate(LLAMA.runner, SAME, 4, draft=v), ["ngram", 5, Ngram, LLAMA.runner]),
    ("batch", lambda v: LLAMA.runner.allocate(v, 8), [*NO_WHOLE, 0, -1]),
    ("length", lambda v: LLAMA.runner.allocate(2, v), [*NO_WHOLE, 0, -1]),
    ("temperature", lambda v: Sampling(temperature=v), [*NO_NUMBER, -1]),
    ("top_k", lambda v: Sampling(top_k=v), ["5", 1.5, True, 0]),
    ("seed", lambda v: Sampling(seed=v), ["x", 1.5, None, -1]),
    ("encoding", lambda v: Plan(encoding=v), [None, "int8", Int8, 5]),
    ("cache", lambda v: Plan(cache=v), [None, "static", Static, 512, SimpleNamespace(allocate=None)]),
    ("compiler", lambda v: Plan(compiler=v), [None, True, Compiled, "compiled", SimpleNamespace(compile=None)]),
    ("arithmetic", lambda v: Plan(arithmetic=v), [None, "triton", Triton]),
    ("shard", lambda v: Plan(shard=v), [None, 2, TensorParallel]),
    ("fuse_projections", lambda v: Plan(fuse_projections=v), [None, "yes", 2, []]),
    ("length", lambda v: Static(v), ["512", 1.5, True, 0, -1]),
    ("multiple", lambda v: Static(multiple=v), [None, "256", 1.5, 0]),
    ("regions", lambda v: Compiled(v), [None, "yes", 1]),
    ("rank", lambda v: TensorParallel(v, 2), [None, "0", 0.0, True, 2, -1]),
    ("(size|rank)", lambda v: TensorParallel(0, v), [None, "2", 2.0, 0, -1]),
    ("runner", lambda v: Draft(v), [None, "model", LLAMA, CHECKPOINT]),
    ("k", lambda v: Draft(LLAMA.runner, v), ["5", 1.5, True, 0]),
    ("k", lambda v: Ngram(v), ["5", 1.5, True, 0, -1]),
    ("k", lambda v: Padded(v), [None, "5", 0]),
    ("most", lambda v: Ngram(most=v), [None, "7", 0]),
    ("longest", lambda v: Ngram(longest=v), [None, "4", 1]),
    ("shortest", lambda v: Ngram(shortest=v), [None, "2", 0, 9]),
    ("aligned", lambda v: Ngram(3, aligned=v), [None, "yes"]),
    ("llama", lambda v: Chat(v), [None, "model", LLAMA.runner, Llama]),
    ("system", lambda v: Chat(LLAMA, v), [5, b"x", ["x"], {"role": "system"}]),
    ("max_new_tokens", lambda v: Chat(LLAMA, None, v), [*NO_WHOLE, 0]),
    ("sampling", lambda v: Chat(LLAMA, sampling=v), [None, 0.7, {}, Sampling]),
    ("stop", lambda v: Chat(LLAMA, stop=v), [3, b"x", [3]]),
    ("text", lambda v: next(Chat(LLAMA).say(v)), [None, 5, b"x", ["x"], {"role": "user"}, "\ud800"]),
    ("path", open_checkpoint, [None, 5, b"x", []]),
    ("path", load_tokenizer, [None, 5, b"x"]),
    ("model", resolve, [None, 5, b"x"]),
    ("config", lambda v: random_checkpoint(v), [None, "llama-2-7b", {}]),
    ("seed", lambda v: random_checkpoint(CONFIG, v), [None, "x", 1.5, -1]),
    ("prompt", lambda v: greedy(REFERENCE, v, 3), [None, "text", 5, [], [1.5], [259], [-1], torch.ones(3)]),
    ("max_new_tokens", lambda v: greedy(REFERENCE, IDS, v), NO_WHOLE),
    ("temperature", lambda v: sample(REFERENCE, IDS, 3, v, torch.Generator()), ["hot", None, 0, float("nan")]),
    ("top_k", lambda v: sample(REFERENCE, IDS, 3, 1.0, torch.Generator(), v), ["5", 0, 1.5]),
    ("n_layers", lambda v: LlamaConfig(48, v, 6, 2, 10, 72, 259, 128), [None, "2", 1.5, True, 0]),
    ("norm_eps", lambda v: LlamaConfig(48, 2, 6, 2, 10, 72, 259, 128, norm_eps=v), [None, "x", 0, float("nan")]),
    ("eos_ids", lambda v: LlamaConfig(48, 2, 6, 2, 10, 72, 259, 128, eos_ids=v), ["x", [1.5], [999], 999]),
    ("rows", lambda v: Case(v, (), (), 3), [None, 5, "text", IDS, [["a"]], [[1.5]]]),
    ("prompts", lambda v: Case((), (), v, 3), [None, 5, "text", IDS]),
    ("splits", lambda v: Case(CASE.rows, v, (), 3), [None, 5, [5], [(1, 2)], [Split((1,), (2,))], [Split((1, 2), (3, 9))]]),
    ("new_tokens", lambda v: Case((), (), (), v), [*NO_WHOLE, -1]),
    ("starts", lambda v: Split(v, (3, 4)), [None, 1, "x", (1,), (0, 1), (4, 1), (1.5, 2)]),
    ("ends", lambda v: Split((1, 2), v), [None, 1, "x", (3,)]),
    ("subject", lambda v: judge(v, BENCH, CASE), [None, "ours", RefSubject, REFERENCE]),
    ("bench", lambda v: judge(TRUTH, v, CASE), [None, TRUTH, Bench]),
    ("case", lambda v: judge(TRUTH, BENCH, v), [None, CASE.rows, Case, Case(((300, 2),), (), (), 1)]),
    ("seed", lambda v: random_row(64, 5, v), [None, "x"]),
    ("vocab_size", lambda v: standard_case(v, 64), [None, "64", 0]),
    ("max_context", lambda v: standard_case(64, v), [None, "64", 0]),
    ("config", lambda v: RefSubject(v, {}, torch.float32), [None, {}]),
    ("weights", lambda v: RefSubject(CONFIG, v, torch.float32), [None, "dir", CHECKPOINT]),
    ("dtype", lambda v: RefSubject(CONFIG, {}, v), [None, torch.int8, "x"]),
    ("orders", lambda v: Yardstick(CONFIG, {}, torch.float32, orders=v), [None, 0, "x"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "call", "value"),
    [
        pytest.param(name, call, value, id=f"{i}-{name}-{str(value)[:20]!r}")
        for i, (name, call, values) in enumerate(HANDED_OVER)
        for value in values
    ],
)
def test_what_has_no_plain_meaning_is_refused_by_name_in_one_line(name: str, call: Call, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}s?\b") as caught:
        call(value)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and len(said) < 400, said
    innermost = Path(traceback.extract_tb(caught.tb)[-1].filename)
    assert innermost.is_relative_to(ROOT) and not innermost.is_relative_to(ROOT / "tests"), innermost


def test_a_refusal_leaves_the_cache_where_it_was() -> None:
    LLAMA.generate("Hello", 100)
    kept = LLAMA.cache_length(1)
    for options in (
        {"temperature": "hot"},
        {"seed": [1, 2]},
        {"draft": 5},
        {"logprobs": "2"},
        {"max_new_tokens": 10**6},
    ):
        with pytest.raises((TypeError, ValueError)):
            LLAMA.generate("Hello", **options)  # type: ignore[arg-type]
        assert LLAMA.cache_length(1) == kept is not None


@pytest.mark.parametrize(
    "message", [{}, {"role": 5}, {"content": "x"}, {"role": "user"}, {"role": "user", "content": None}]
)
def test_a_message_that_is_none_is_refused_in_one_line(message: Any) -> None:
    for call in (LLAMA.generate, LLAMA.score, LLAMA.stream, LLAMA.encode):
        with pytest.raises(ValueError, match="message") as caught:
            call([message])
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LLAMA.chat_text("Hi"), "messages='Hi' must be messages"),
        (lambda: LLAMA.chat_text({"role": "user", "content": "Hi"}), "must be messages"),
        (lambda: LLAMA.chat_text(["Hi"]), "a message must be .*, not 'Hi'"),
        (lambda: LLAMA.generate([{"role": "user", "content": b"Hi"}]), "content is b'Hi': it must be text"),
        (lambda: LLAMA.decode(5), "ids=5 must be token ids"),
        (lambda: LLAMA.decode(None), "ids=None must be token ids"),
        (lambda: LLAMA.decode("ab"), "ids='ab' must be token ids"),
        (lambda: LLAMA.decode([1.5]), "ids holds 1.5"),
        (lambda: LLAMA.decode([5, 259]), "token id 259 is outside the vocabulary of 259"),
        (lambda: LLAMA.decode([-1]), "token id -1 is outside"),
        (lambda: Chat(LLAMA, stop=["x", ""]), "a stop string is empty"),
        (lambda: Llama.from_pretrained("x" * 5000), "unknown model"),
    ],
)
def test_what_no_model_could_take_is_refused_where_it_is_given(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 800


def test_ids_become_text_whatever_holds_them() -> None:
    for ids in (np.array([72, 105]), torch.tensor([[72, 105]]), (token for token in (72, 105)), range(72, 106, 33)):
        assert LLAMA.decode(ids) == "Hi"


def test_the_helpers_take_and_refuse_as_they_say() -> None:
    assert whole("n", np.int8(3)) == 3 and real("x", np.float32(0.5)) == 0.5
    with pytest.raises(ValueError, match="n=3 must be at least 4"):
        whole("n", 3, 4)
