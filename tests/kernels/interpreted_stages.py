"""Two pipeline stages by our kernels against PyTorch's whole model, in the interpreter. Run by test_interpreted.py."""

import torch

from llama_fast.arithmetic.triton import Triton
from llama_fast.build import build
from llama_fast.caches.static import Static
from llama_fast.parallel.stages import Stages
from llama_fast.plan import Plan
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig

CONFIG = LlamaConfig(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=20, ffn_dim=56, vocab_size=35, max_context=64
)


def main() -> None:
    """A ragged prompt of both rows, then a token each: what the first stage gives, the second takes, twice unharmed."""
    checkpoint = random_checkpoint(CONFIG, 3, "cpu", torch.float32)
    plans = [
        Plan(cache=Static(length=32), shard=Stages(i, 2), arithmetic=Triton(), fuse_projections=True) for i in range(2)
    ]
    first, second = (build(checkpoint, plan, "cpu") for plan in plans)
    whole = build(checkpoint, Plan(cache=Static(length=32)), "cpu")
    caches = [runner.allocate(2, 20) for runner in (first, second, whole)]
    tokens_BT, last_B = torch.randint(35, (2, 9), generator=torch.Generator().manual_seed(3)), torch.tensor([8, 5])
    with torch.no_grad():
        for ids_BT, start_B, at_B in (
            (tokens_BT, None, last_B),
            (torch.tensor([[4], [7]]), last_B + 1, None),
        ):
            x_BTD = first.model(ids_BT, start_B, caches[0])
            assert x_BTD.shape == (*ids_BT.shape, 32)
            kept = x_BTD.clone()
            for _ in range(2):
                logits = second.model(x_BTD, start_B, caches[1], last_B=at_B)
                torch.testing.assert_close(
                    logits, whole.model(ids_BT, start_B, caches[2], last_B=at_B), atol=2e-5, rtol=2e-5
                )
            assert torch.equal(x_BTD, kept), "what came in is not written over"
    print("stages: 4 results agree")


if __name__ == "__main__":
    main()
