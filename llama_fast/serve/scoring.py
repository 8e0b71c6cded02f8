"""Log-probabilities of a prompt's own tokens, for `echo`: one forward pass, in the engine's thread between two steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_fast.engine.logprobs import TokenLogprob
from llama_fast.engine.runner import Runner
from llama_fast.engine.transfer import pad

CHUNK = 256
"""Positions whose log-probabilities are held at once, as float32 [CHUNK, V]."""


@torch.no_grad()
def prompt_logprobs(runner: Runner, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """What the model gives each token after the first, and the `top` likeliest at its place."""
    if len(ids) < 2:
        return []
    logits_TV = runner.score(pad([ids[:-1]], runner.device)[0])[0, : len(ids) - 1]
    found: list[TokenLogprob] = []
    for start in range(0, len(logits_TV), CHUNK):
        logprob_TV = logits_TV[start : start + CHUNK].float().log_softmax(-1)
        wanted = list(ids[start + 1 : start + 1 + len(logprob_TV)])
        wanted_T1 = torch.tensor(wanted, device=logprob_TV.device)[:, None]
        likeliest = logprob_TV.topk(min(top, logprob_TV.shape[-1]), -1)
        columns = zip(
            wanted,
            logprob_TV.gather(-1, wanted_T1)[:, 0].tolist(),
            likeliest.indices.tolist(),
            likeliest.values.tolist(),
            strict=True,
        )
        found += [TokenLogprob(token, one, dict(zip(tops, values))) for token, one, tops, values in columns]
    return found
