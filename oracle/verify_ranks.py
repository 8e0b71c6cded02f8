"""Judge a model that is cut over processes: `torchrun ... -m oracle verify`, or `llama-oracle verify --ranks 2` on one host;
with `--stages 2` also one whose layers stand on several.

Every rank builds its part, makes the same calls and judges the same answers against a truth of its own; all must hold the same
bits. Asked are the model by every route, its blocks, its face, and tiny models whose shapes are the corners of cutting: biases, a
table that is head too, shared key heads, a vocabulary that does not divide.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from llama_fast.build import build
from llama_fast.compilers.eager import Eager
from llama_fast.contracts import Shard
from llama_fast.parallel.ranks import Member, check_stages
from llama_fast.parallel.stages import Stages
from llama_fast.parallel.tensor_parallel import TensorParallel
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint, random_checkpoint
from llama_ref.config import LlamaConfig
from oracle.questions.cases import standard_case
from oracle.questions.checkpoints import judge_repetition, references
from oracle.questions.face import Faces, judge_face
from oracle.questions.generation import judge_draws, judge_stopping
from oracle.questions.judge import Bench, judge
from oracle.questions.localise import first_beyond, judge_stages, layer_curve, summary
from oracle.questions.seeds import judge_seeds
from oracle.questions.slots import judge_slots
from oracle.questions.tokens import Encode
from oracle.report.certificate import Certificate
from oracle.statistics.compare import Check, Verdict, unit_roundoff
from oracle.subjects.adapters import Rows
from oracle.subjects.fast import FastSubject
from oracle.subjects.subject import Trace
from oracle.subjects.walkers import walker
from oracle.verify import SHORT, TOKENS_A_STEP, for_small_models, shown_stages, subject_of

CORNER = LlamaConfig(48, 2, 8, 4, 12, 80, 131, 160)
CORNERS = {
    "biases": replace(CORNER, attention_bias=True, mlp_bias=True),
    "a head tied to its table": replace(CORNER, tie_embeddings=True, vocab_size=97),
    "one key head for all": replace(CORNER, n_kv_heads=1, vocab_size=63),
    "a key head a query head": replace(CORNER, n_kv_heads=8, window=24),
}


@dataclass
class RankCertificate(Certificate):
    """A certificate of one rank."""

    rank: int = 0


class TellingSubject(FastSubject):
    """A subject that keeps a digest of every answer, by which ranks are compared."""

    digest = hashlib.sha256(b"")

    def _tell(self, answers: Sequence[Tensor]) -> None:
        for answer in answers:
            self.digest.update(answer.float().cpu().numpy().tobytes())

    def prefill_logits(self, rows: Rows) -> list[Tensor]:
        found = super().prefill_logits(rows)
        self._tell(found)
        return found

    def decode_logits(self, rows: Rows, splits: Sequence[int]) -> list[Tensor]:
        found = super().decode_logits(rows, splits)
        self._tell(found)
        return found

    def greedy(self, prompts: Rows, n: int) -> list[tuple[list[int], Tensor]]:
        found = super().greedy(prompts, n)
        self._tell([logits for _, logits in found])
        return found


def check_ranks(checkpoint: Checkpoint, count: int, stages: int = 1) -> None:
    """ValueError, with the numbers, where a model is not cut over so many; before processes are started for it."""
    if count < 2:
        raise ValueError(f"--ranks {count}: a model is cut over two or more")
    check_stages(count, stages)
    Stages(0, stages, TensorParallel(0, count // stages)).local_config(checkpoint.config)


def start_ranks(count: int, words: Sequence[str]) -> int:
    """The same command on so many processes of this host; their exit code."""
    kept = [word for i, word in enumerate(words) if word != "--ranks" and words[i - 1] != "--ranks"]
    kept = [word for word in kept if not word.startswith("--ranks=")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    threads = str(max(1, torch.get_num_threads() // count))
    done = subprocess.run(
        [*launcher, "-m", "oracle", *kept],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stderr=subprocess.PIPE,
        text=True,
    )
    told = [line for line in done.stderr.splitlines() if line.startswith(("· ", "llama-oracle: "))]
    print("\n".join(dict.fromkeys(told)), file=sys.stderr)  # each rank says the same
    if done.returncode == 0:
        return 0
    return 2 if any(line.startswith("llama-oracle: ") for line in told) else 1


def verify_ranks(
    checkpoint: Checkpoint,
    plan: Plan,
    member: Member,
    dtype: torch.dtype,
    encode: Encode | None = None,
    model_name: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> RankCertificate:
    """This rank's certificate; all ranks' outcomes and bits are in it. `member` leaves at the end."""
    plan, device, rank = replace(plan, shard=member.shard), member.device, dist.get_rank()
    plan.shard.local_config(checkpoint.config)  # ValueError, with numbers, before anything is built
    told = f"{plan}, {'nccl' if device.type == 'cuda' else 'gloo'}"
    certificate = RankCertificate(subject_of(model_name, told, plan, device, dtype), rank=rank)
    say = progress if rank == 0 else (lambda _: None)
    for of_type in dict.fromkeys((torch.float32, dtype)):
        say(f"{str(of_type)[6:]}: a model over {member.size} ranks")
        _verify_model(certificate, checkpoint, plan, device, of_type, encode)
    say("corners of cutting, the library's face")
    stages = 1 if plan.shard.line is None else plan.shard.line.count
    corners = {name: replace(config, n_layers=max(2, stages)) for name, config in CORNERS.items()}
    corners = {name: config for name, config in corners.items() if _divides(config, plan.shard)}
    small = [walker(layers=stages), *(random_checkpoint(config) for config in corners.values())]
    walks = _divides(small[0].config, plan.shard)
    plain, notes = for_small_models(replace(plan, compiler=Eager()), device, small if walks else small[1:])
    certificate.notes += notes
    for name, config in corners.items():
        certificate.ask(f"corner: {name}", partial(_corner, config, plain, device))
    if walks:
        certificate.ask("face", lambda: judge_face(plain, device))
        certificate.ask("slots", lambda: judge_slots(Faces(plain, device)))
        certificate.ask("seeds", lambda: judge_seeds(Faces(plain, device)))
    else:
        certificate.notes.append(f"face, slots and seeds not asked: a walker's heads do not divide ({plan.shard})")
    certificate.parts["all ranks"] = _of_all_ranks(certificate, member)
    member.leave()
    return certificate


def _verify_model(
    certificate: RankCertificate,
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    encode: Encode | None,
) -> None:
    name, config = str(dtype).removeprefix("torch."), checkpoint.config
    case = standard_case(config.vocab_size, config.max_context, encode)
    runner = build(checkpoint, plan, device=device, dtype=dtype)
    truth, yardstick = references(runner, checkpoint)
    width = None if plan.compiler.compiles_each_shape else TOKENS_A_STEP
    subject = TellingSubject(runner, len(case.rows), case.longest, used_cache=True, tokens_a_step=width)

    def blocks() -> Verdict:
        cut, traces = shown_stages(subject, truth, case.rows)
        whole = everywhere([{stage: value for stage, value in trace.items() if is_whole(stage)} for trace in traces])
        stages = judge_stages(cut, whole, truth, yardstick, config.n_layers, unit_roundoff(dtype))
        certificate.layers[name] = layer_curve(stages)
        certificate.first_fault = certificate.first_fault or first_beyond(stages)
        return summary(stages)

    certificate.ask(f"{name} blocks", blocks)
    certificate.ask(f"{name} logits", partial(judge, subject, Bench(truth, yardstick), case))
    certificate.ask(f"{name} stop rules", partial(judge_stopping, subject, case.prompts, SHORT, quick=True))
    certificate.ask(f"{name} draws", partial(judge_draws, subject, case.prompts, SHORT, runs=2))
    certificate.ask(f"{name} repetition", partial(judge_repetition, subject, case.prompts, SHORT))


def everywhere(traces: list[Trace]) -> list[Trace]:
    """What all ranks show of each row: of a model in stages each has some of the blocks. This rank's own stands above others'."""
    said: list[list[Trace]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(said, [{stage: value.cpu() for stage, value in trace.items()} for trace in traces])
    rows: list[Trace] = []
    for mine, *others in zip(traces, *said, strict=True):
        device = next(iter(mine.values())).device
        rows.append({stage: value.to(device) for other in others for stage, value in other.items()} | dict(mine))
    return rows


def is_whole(stage: str) -> bool:
    """Whether every rank holds all of a stage: whole blocks, and what stands before and after them."""
    return stage in ("embedding", "norm", "logits") or stage.rpartition(".")[2].isdigit()


def _divides(config: LlamaConfig, shard: Shard) -> bool:
    try:
        shard.local_config(config)
    except ValueError:
        return False
    return True


def _corner(config: LlamaConfig, plan: Plan, device: torch.device) -> Verdict:
    checkpoint = random_checkpoint(config, 3)
    runner = build(checkpoint, plan, device=device, dtype=torch.float32)
    subject = TellingSubject(runner, used_cache=True)
    return judge(subject, Bench(*references(runner, checkpoint)), standard_case(config.vocab_size, 120))


def _of_all_ranks(certificate: RankCertificate, member: Member) -> Verdict:
    """That every rank came to the same outcome, by the same bits."""
    size = dist.get_world_size()
    said: list[tuple[str, str, str]] = [("", "", "")] * size
    failed = next((f"{check.name} {check.where}" for check in certificate.verdict.failures), "")
    dist.all_gather_object(said, (certificate.outcome.value, failed, TellingSubject.digest.hexdigest()))
    wrong = [f"rank {rank}: {outcome}, {told}" for rank, (outcome, told, _) in enumerate(said) if outcome != "AGREE"]
    bits = len({digest for _, _, digest in said}) - 1
    return Verdict(
        (
            Check("ranks that do not agree with truth", len(wrong), 0, "".join(wrong[:1]), size),
            Check("ranks with other bits", bits, 0, "", size),
        )
    )
