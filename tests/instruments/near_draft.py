"""Speculation on a GPU with a draft of fewer bits, at an acceptance that is set: rates, costs, and what the formula promises.

    python tests/instruments/near_draft.py [--model random:llama-2-7b] [--draft-encoding int4] [--noise 0,0.05,0.1,model]

A random model accepts few of its int4 draft's tokens, as a trained one does not. So the draft is the model in that encoding, and
the target the numbers that the draft decodes to, plus noise: normal, of so many times the root mean square of each matrix.
Noise 0 is a target that differs from its draft by rounding alone; "model" the model itself, off by the encoding's own error.
Target and draft are fused, the target dense in bf16; every setting is decoded plainly, with automatic k and with each fixed k.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from llama_fast.build import build
from llama_fast.engine.generate import Generation, generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.recipes import encoding_named, fused
from llama_fast.speculative.adaptive_k import speedup
from llama_fast.speculative.proposers import Draft
from llama_ref.checkpoint import Checkpoint, TensorSource
from llama_ref.models import resolve
from llama_ref.random_weights import stable_seed
from llama_ref.weights import Key

NEW_TOKENS, PROMPT = 200, [(37 * i) % 900 + 5 for i in range(6)]
SETTINGS = {"greedy": Sampling(), "temperature 0.8": Sampling(0.8)}


@dataclass(frozen=True)
class Noisy:
    """A matrix as another one decodes to it, plus noise of `share` of its root mean square."""

    name: str
    decoded: Mapping[str, torch.Tensor]
    share: float
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, key: Key, /) -> torch.Tensor:
        weight = self.decoded[self.name].float()
        if len(self.shape) == 2 and self.share:
            generator = torch.Generator(weight.device).manual_seed(stable_seed(1, self.name))
            noise = torch.randn(self.shape, generator=generator, device=weight.device)
            weight = weight + noise * (self.share * weight.square().mean().sqrt())
        return weight.to(self.dtype)[key]


class NearWeights(Mapping[str, TensorSource]):
    """The weights of a model near what a draft of it computes with; each is made when it is read."""

    def __init__(self, draft: Runner, share: float):
        self.draft, self.share = draft, share
        self.decoded = draft.reference_weights()

    def __getitem__(self, name: str) -> TensorSource:
        shape = tuple(self.draft.checkpoint.weights[name].shape)
        return Noisy(name, self.decoded, self.share, shape, self.draft.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.draft.checkpoint.weights)

    def __len__(self) -> int:
        return len(self.draft.checkpoint.weights)


def near(draft: Runner, share: float) -> Checkpoint:
    """A dense checkpoint at this distance from a draft."""
    return dataclasses.replace(draft.checkpoint, weights=NearWeights(draft, share))


def timed(target: Runner, sampling: Sampling, draft: Draft | None) -> tuple[float, Generation]:
    """Tokens/s of the whole generation, the median of five after one that compiles; and the last."""
    cache = target.allocate(1, 256)
    done = [generate(target, [PROMPT], NEW_TOKENS, sampling, cache=cache, draft=draft) for _ in range(6)]
    return statistics.median(one.tokens_per_second for one in done[1:]), done[-1]


def measure(target: Runner, small: Runner, ks: list[int], about: str) -> None:
    for name, sampling in SETTINGS.items():
        plain, _ = timed(target, sampling, None)
        print(f"{about}, {name}: plain {plain:.1f} tokens/s", flush=True)
        automatic = Draft(small)
        for k, draft in ((None, automatic), *((k, Draft(small, k)) for k in ks)):
            rate, done = timed(target, sampling, draft)
            counted = done.speculation
            assert counted is not None
            text = (
                f"  k={k or 'automatic'}: {rate:.1f} tokens/s, {rate / plain:.3f}x, acceptance {counted.acceptance:.3f}"
            )
            costs = [*draft._costs.values()][-1] if draft._costs else None
            c, v = (costs.c, costs.v(k)) if costs is not None and k else (None, None)
            if c is not None and v is not None and k:
                text += f"; c {c:.3f}, v {v:.3f}: the formula says {speedup(counted.acceptance, k, c, v):.3f}x"
            if k is None:
                text += f"; c {counted.draft_cost}, v {counted.check_cost}, rounds of k {counted.ks}"
                text += f"; {counted.notice or 'no notice'}"
            print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-2-7b")
    parser.add_argument("--draft-encoding", default="int4")
    parser.add_argument("--noise", default="0,0.05,0.1,model")
    parser.add_argument("--ks", default="2,3,4,5,7")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    device, kind = torch.device(asked.device), encoding_named(asked.draft_encoding)
    checkpoint = resolve(asked.model).open(device, torch.bfloat16)
    small = build(checkpoint, fused(kind), device, torch.bfloat16)
    for noise in asked.noise.split(","):
        nearby = checkpoint if noise == "model" else near(small, float(noise))
        target = build(nearby, fused(), device, torch.bfloat16)
        measure(target, small, [int(k) for k in asked.ks.split(",")], f"{asked.model} {kind.name} noise {noise}")
        del target
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
