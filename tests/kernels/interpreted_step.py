"""A whole step by our kernels against the reference, in the interpreter. Run by test_interpreted.py with TRITON_INTERPRET=1."""

import dataclasses

import torch

from llama_fast.arithmetic.triton import MOST_PROMPT_ROWS
from llama_fast.build import build, rebuild
from llama_fast.caches.paged import Paged
from llama_fast.compilers.compiled import Compiled
from llama_fast.compilers.eager import Eager
from llama_fast.encodings.dense import Dense
from llama_fast.encodings.int8 import Int8
from llama_fast.engine.engine import Engine
from llama_fast.engine.generate import generate
from llama_fast.engine.request import Event, Request
from llama_fast.engine.runner import Runner
from llama_fast.kernels import ops
from llama_fast.recipes import encoding_named, fused, paged
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.model import Llama as Reference

ops.ARGMAX_STRETCH = 16  # the vocabulary takes three
CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=20, ffn_dim=56, vocab_size=35, max_context=256
)


def prompts(runner: Runner, exact: Reference) -> int:
    """Ragged prompts longer than any kernel's rows, a token each on the cache they left, and a text's continuation behind it."""
    tokens_BL = torch.randint(CONFIG.vocab_size, (3, 60), generator=torch.Generator().manual_seed(7))
    wanted_BLV, rows_B1 = exact(tokens_BL), torch.arange(3)[:, None]
    cache = runner.allocate(3, 60)
    lengths_B = torch.tensor([18, 9, 13])
    logits_BV = runner.prefill(tokens_BL[:, :18], lengths_B, cache)
    torch.testing.assert_close(logits_BV.double(), wanted_BLV[rows_B1[:, 0], lengths_B - 1], atol=2e-5, rtol=2e-5)
    logits_B1V = runner.decode(tokens_BL[rows_B1, lengths_B[:, None]], lengths_B, cache)
    torch.testing.assert_close(logits_B1V, wanted_BLV[rows_B1, lengths_B[:, None]].float(), atol=2e-5, rtol=2e-5)
    # behind that, more tokens than our attention takes in a row, and fewer
    for T in (34, 5):
        start_B, counts_B = lengths_B + 1, torch.tensor([T, T - 3, T - 1])
        at_BT = start_B[:, None] + torch.arange(T)
        _, logits_BV = runner.extend(tokens_BL[rows_B1, at_BT], start_B, counts_B, cache, runner.greedy(3))
        wanted_BV = wanted_BLV[rows_B1[:, 0], start_B + counts_B - 1]
        torch.testing.assert_close(logits_BV.double(), wanted_BV, atol=2e-5, rtol=2e-5)
    scored_BTV = runner.score(tokens_BL[:, :25])
    torch.testing.assert_close(scored_BTV.double(), wanted_BLV[:, :25], atol=2e-5, rtol=2e-5)
    scored_BTV = runner.score(tokens_BL.repeat(3, 1)[:, :16])  # more rows than our attention keeps scratch memory for
    torch.testing.assert_close(scored_BTV.double(), wanted_BLV.repeat(3, 1, 1)[:, :16], atol=2e-5, rtol=2e-5)
    assert max(runner.model.operations._scratch) <= MOST_PROMPT_ROWS  # type: ignore[attr-defined]
    return 6


def mixed_heads() -> int:
    """A head that is stored otherwise than the layers; two rows, the second a position behind the first."""
    for layers, head in (("int8", "int4-g32"), ("dense", "fp8")):
        checkpoint = dataclasses.replace(random_checkpoint(CONFIG, 1), encodings={"output": head})
        plan = dataclasses.replace(fused(encoding_named(layers)), compiler=Eager())
        runner = build(checkpoint, plan, "cpu", torch.float32)
        tokens_BT, rows_B = torch.tensor([[5, 9], [7, 1]]), torch.arange(2)
        start_B = torch.tensor([1, 0])
        wanted_BTV = Reference(CONFIG, runner.reference_weights(), torch.float64)(tokens_BT)
        cache = runner.allocate(2, 8)
        runner.decode(tokens_BT[:, :1], torch.zeros(2, dtype=torch.int64), cache)
        logits_BV = runner.decode(tokens_BT[rows_B, start_B][:, None], start_B, cache)[:, -1]
        torch.testing.assert_close(logits_BV.double(), wanted_BTV[rows_B, start_B], atol=2e-5, rtol=2e-5)
    return 2


def served(runner: Runner) -> int:
    """Rows that share pages, make way and are read by chunks say what they say in slots of their own."""
    tight = dataclasses.replace(runner.plan, cache=Paged(tokens=20, page=4))
    engine = Engine(rebuild(runner, tight), 2, 24, chunk=5)
    begin = [3, 9, 27, 11, 33, 29]
    requests = [Request([*begin, 1], 6), Request([*begin, 2, 3], 6)]
    ids = [engine.add(request) for request in requests]
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    assert engine.pre_emptions and engine.reused_tokens
    for id, request in zip(ids, requests, strict=True):
        alone = generate(runner, [request.ids], request.max_new_tokens).completions[0].tokens
        assert [event.token for event in events if event.id == id] == alone
    return len(requests)


def main() -> None:
    """B rows at unequal positions, T tokens a step, through a cache whose later slots hold garbage."""
    checked = 0
    for encoding, shapes in ((Dense(), ((1, 1), (2, 4), (9, 1))), (Int8(), ((2, 1), (4, 2), (11, 1)))):
        checkpoint = random_checkpoint(CONFIG, 1, "cpu", torch.float32)
        runner = build(checkpoint, dataclasses.replace(fused(encoding), compiler=Eager()), "cpu")
        exact = Reference(CONFIG, runner.reference_weights(), torch.float64)
        for B, T in shapes:
            tokens_BL = torch.randint(CONFIG.vocab_size, (B, 20), generator=torch.Generator().manual_seed(B))
            wanted_BLV = exact(tokens_BL)
            cache = runner.allocate(B, 20)
            for layer in cache.layers:
                for stored in layer.tensors:
                    stored.fill_(torch.nan)
            rows_B1 = torch.arange(B)[:, None]
            for slot in range(3):  # columns of a larger tensor: a view with gaps
                runner.decode(tokens_BL[:, slot : slot + 1], torch.full((B,), slot), cache)
            for first in range(0, 2 * T, T):
                start_B = torch.arange(B) % 3 + first
                at_BT = start_B[:, None] + torch.arange(T)
                token_B, logits_BTV = runner.step(tokens_BL[rows_B1, at_BT], start_B, cache, runner.greedy(B))
                torch.testing.assert_close(logits_BTV.double(), wanted_BLV[rows_B1, at_BT], atol=2e-5, rtol=2e-5)
                assert torch.equal(token_B, logits_BTV[:, -1].argmax(-1))
                checked += 1
        checked += prompts(runner, exact)
        if encoding == Dense():
            checked += prompts(rebuild(runner, paged(runner.plan)), exact)
            checked += served(runner)
        try:
            rebuild(runner, dataclasses.replace(runner.plan, compiler=Compiled()))
            raise AssertionError("kernels of our own are nothing that a compiler can read")
        except ValueError as error:
            assert "take Graphed()" in str(error)
    checked += mixed_heads()
    print(f"step: {checked} results agree")


if __name__ == "__main__":
    main()
