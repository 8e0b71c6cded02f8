"""How a fault or a variation is tried: the parts of a verification that can see it, with what failed and where."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llama_fast.build import build
from llama_fast.plan import Plan
from llama_fast.speculative.proposers import Draft, Ngram
from llama_ref.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from oracle.questions.cases import TEXT, Case, random_row, standard_case
from oracle.questions.checkpoints import judge_repetition, judge_round_trip, judge_text, judge_window, references
from oracle.questions.face import Faces, judge_face
from oracle.questions.generation import judge_draws, judge_stopping
from oracle.questions.judge import Bench, judge
from oracle.questions.law import judge_rounds
from oracle.questions.localise import first_beyond, judge_rope_table, judge_stages, judge_weights, summary
from oracle.questions.objects import judge_objects
from oracle.questions.requests import judge_requests
from oracle.questions.sampling import judge_sampling
from oracle.questions.seeds import judge_seeds
from oracle.questions.slots import judge_slots
from oracle.questions.speculation import judge_acceptance, judge_speculation
from oracle.questions.stored import judge_stored, rounded_reference
from oracle.questions.survival import survived
from oracle.questions.threads import RankedSubject, judge_ranks
from oracle.questions.witnesses import Told, judge_conversations, judge_ids, numbers
from oracle.statistics.compare import Verdict, unit_roundoff
from oracle.statistics.drift import budget_of
from oracle.subjects.adapters import angles, radius
from oracle.subjects.fast import FastSampler, FastSubject
from oracle.subjects.others import HFSubject
from oracle.subjects.walkers import CHAT
from oracle.verify import bench_for, shown_stages
from oracle.verify_ranks import CORNERS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Found:
    """What a trial found: verdicts by part, and the first stage beyond its budget."""

    parts: dict[str, Verdict]
    first: str = ""

    @property
    def verdict(self) -> Verdict:
        return Verdict(tuple(check for name, part in self.parts.items() for check in part.named(name).checks))

    @property
    def words(self) -> str:
        return " | ".join(f"{check.name} {check.where}" for check in self.verdict.failures)


def short_case(case: Case) -> Case:
    """The case with its first two splits: the middle, and from the first token on."""
    return replace(case, splits=case.splits[:2], new_tokens=min(12, case.new_tokens))


def model(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    """Angles, stages, weights, logits by every route, greedy tokens, the end of the window: of one runner."""
    config = checkpoint.config
    runner = build(checkpoint, plan, device="cpu", dtype=dtype)
    case = short_case(standard_case(config.vocab_size, config.max_context, seed=seed))
    truth, yardstick = references(runner, checkpoint)
    subject = FastSubject(runner, len(case.rows), case.longest, used_cache=True, tokens_a_step=5)
    cut, traces = shown_stages(subject, truth, case.rows)
    stages = judge_stages(cut, traces, truth, yardstick, config.n_layers, unit_roundoff(dtype))
    table = angles(config, config.max_context)
    lossy, budget = plan.encoding.name != "dense", budget_of(plan.encoding.name)
    step, drops = (0.0, False) if budget is None else (budget.weight_step, budget.drops_two_of_four)
    parts = {
        "rope table": judge_rope_table(runner.model.rope_table, table, radius(config)),
        "stages": summary(stages),
        "weights": judge_weights(
            runner.reference_weights(),
            {k: v[:].to(dtype) if not lossy else v[:] for k, v in checkpoint.weights.items()},
            step,
            drops,
        ),
        "logits": judge(subject, Bench(truth, yardstick), case),
    }
    parts["window"] = judge_window(checkpoint, plan, CPU, dtype)[0]
    if lossy and dtype is not torch.float32:
        parts["stored numbers"] = judge_stored(cut, traces, truth, rounded_reference(truth, dtype), config.n_layers)
    first = first_beyond(stages)
    return Found(parts, "" if first is None else first.name)


def loop(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    config = checkpoint.config
    subject = FastSubject(build(checkpoint, plan, device="cpu", dtype=dtype), batch=2, cache_length=64)
    prompts = [random_row(config.vocab_size, length, seed + length) for length in (9, 5)]
    parts = {
        "stop rules": judge_stopping(subject, prompts, 12),
        "draws": judge_draws(subject, prompts, 12, runs=8),
        "repetition": judge_repetition(subject, prompts, 8),
    }
    return Found(parts)


def requests(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"requests": judge_requests(checkpoint, plan, CPU, dtype)})


def sampling(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"sampling": judge_sampling(FastSampler(CPU), CPU)})


def face(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"face": judge_face(plan, CPU)})


def seeds(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"seeds": judge_seeds(Faces(plan, CPU))})


def objects(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"objects": judge_objects(Faces(plan, CPU))})


def slots(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"slots": judge_slots(Faces(plan, CPU))})


def corners(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    """The shapes at which cutting has its corners, over threads in place of processes."""
    parts = {}
    for name, config in CORNERS.items():
        made = random_checkpoint(config, seed)
        case = short_case(standard_case(config.vocab_size, 40, seed=seed))
        parts[f"corner: {name}"] = judge(RankedSubject(made, plan, dtype, 2), bench_for(made, dtype, CPU), case)
    return Found(parts)


def witnesses(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    """Ids and conversations of the small tokenizer, by the libraries that made it, asked directly."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    files = tokenizer_files()
    settings = {**json.loads(files["tokenizer_config.json"]), "chat_template": CHAT}
    ours = JsonTokenizer({**files, "tokenizer_config.json": json.dumps(settings)})
    backend = Backend.from_str(files["tokenizer.json"])
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT)
    told = Told()
    judge_ids(told, ours, lambda words: [0, *backend.encode(words, add_special_tokens=False).ids])
    judge_conversations(told, ours, theirs)
    return Found({"witnesses": told.verdict()})


def speculation(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    from llama_fast.speculative import acceptance

    target = build(checkpoint, plan, device="cpu", dtype=dtype)
    small = replace(checkpoint.config, n_layers=1)
    other = build(random_checkpoint(small, seed + 7), plan, device="cpu", dtype=dtype)
    prompts = [[*random_row(checkpoint.config.vocab_size, 6, seed), 3, 4, 5, 3, 4], [8, 9, 8, 9, 8, 9]]
    drafts = {"n-gram": Ngram(k=4), "itself": Draft(target, k=3), "another": Draft(other, k=2)}
    verdicts = {
        f"speculation by {name}": judge_speculation(target, checkpoint, draft, prompts, 32)
        for name, draft in drafts.items()
    }
    return Found({"acceptance": judge_acceptance(acceptance.accept, acceptance.accept_greedy), **verdicts})


def rounds(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"rounds": judge_rounds(CPU)})


def ranks(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"ranks": judge_ranks(checkpoint, plan, dtype, bench_for(checkpoint, dtype, CPU))})


def text(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    """A byte-level tokenizer with BOS; its witness is the library that `JsonTokenizer` wraps, asked directly."""
    from tokenizers import Tokenizer as Backend

    files = tokenizer_files()
    backend = Backend.from_str(files["tokenizer.json"])
    ours = JsonTokenizer(files)
    config = replace(checkpoint.config, vocab_size=400, bos_id=ours.bos_id, eos_ids=ours.eos_ids)

    def witness(words: str) -> list[int]:
        return [0, *backend.encode(words, add_special_tokens=False).ids]

    return Found({"text": judge_text(ours, replace(checkpoint, config=config), witness)})


@cache
def tokenizer_files() -> dict[str, str]:
    """A small byte-level BPE learnt from the shipped text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT.read_text(encoding="utf-8")], trainer)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(settings)}


def round_trip(checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype, seed: int = 1) -> Found:
    return Found({"round trip": survived("round trip", lambda: judge_round_trip(checkpoint, plan, CPU, dtype))})


def tensors(path: Path) -> Found:
    """A directory of `transformers`, whose numbers `safetensors` reads again."""
    told = Told()
    numbers(told, path, open_checkpoint(path))
    return Found({"numbers": told.verdict()})


def witness(path: Path) -> Found:
    """A directory of `transformers`, read by us and by `transformers`."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = open_checkpoint(path)
    config: LlamaConfig = ours.config
    case = short_case(standard_case(config.vocab_size, config.max_context))
    return Found({"witness": judge(HFSubject(theirs), bench_for(ours, torch.float32, CPU), case)})


TRIALS = {
    "model": model,
    "loop": loop,
    "requests": requests,
    "sampling": sampling,
    "speculation": speculation,
    "rounds": rounds,
    "ranks": ranks,
    "text": text,
    "round trip": round_trip,
    "face": face,
    "seeds": seeds,
    "objects": objects,
    "slots": slots,
    "corners": corners,
    "witnesses": witnesses,
}
