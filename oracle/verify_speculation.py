"""What `llama-oracle verify --draft` asks besides: the law of acceptance, that of whole rounds, and greedy streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from llama_fast.build import build
from llama_fast.engine.speculation import Speculation
from llama_fast.plan import Plan
from llama_ref.checkpoint import Checkpoint
from oracle.questions.law import judge_rounds
from oracle.questions.speculation import judge_acceptance, judge_speculation
from oracle.report.certificate import Certificate


def verify_speculation(
    certificate: Certificate,
    checkpoint: Checkpoint,
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    proposers: Callable[[torch.dtype], Sequence[Speculation]],
    prompts: Sequence[Sequence[int]] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Add to a certificate: the law of `accept` by enumeration, that of whole rounds by sampling, and greedy streams with every
    proposer, in both types."""
    certificate.ask("acceptance law", judge_acceptance)
    progress("the law of whole rounds")
    certificate.ask("law of rounds", partial(judge_rounds, device))
    for of_type in dict.fromkeys((torch.float32, dtype)):
        name = str(of_type).removeprefix("torch.")
        progress(f"{name}: speculation")
        runner = build(checkpoint, plan, device, of_type)
        for draft in proposers(of_type):
            kind = type(draft).__name__.lower()
            certificate.ask(f"{name} {kind}", partial(judge_speculation, runner, checkpoint, draft, prompts))
