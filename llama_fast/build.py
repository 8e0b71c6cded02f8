"""The one ordered sentence: encode -> shard -> fuse -> construct -> compile.

`build(checkpoint, plan)` says it and returns a Runner: the two phases of generation, prefill and decode, over one model.
Every optimisation is applied here and nowhere else, so the order in which they compose can be read off.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llama_fast.contracts import Operations, Parts
from llama_fast.engine.runner import Runner, decode, prefill
from llama_fast.model.llama import Biased, Block, Joined, Llama, Separate
from llama_fast.plan import Plan
from llama_fast.weights import cut, encoded
from llama_ref.arguments import floating, made, place, shown
from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig

JOINED = {"qkv": ("attention.wq", "attention.wk", "attention.wv"), "gate_up": ("feed_forward.w1", "feed_forward.w3")}
ALONE = {"wo": "attention.wo", "w2": "feed_forward.w2"}


def build(
    checkpoint: Checkpoint, plan: Plan, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> Runner:
    """The checkpoint's model under `plan`, ready to run.

    Defaults: a GPU if there is one; bf16 there, float32 on a CPU. Raises ValueError where the plan cannot be built.
    """
    made("checkpoint", checkpoint, "a checkpoint, as open_checkpoint() gives", "config", "weights", "encoding")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan={shown(plan)} must be a Plan, as Plan(encoding=Int8())")
    device = where(device)
    dtype = default_dtype(device) if dtype is None else floating("dtype", dtype)
    if checkpoint.encoding not in ("dense", plan.encoding.name):
        raise ValueError(f"the checkpoint is stored as {checkpoint.encoding}, the plan asks for {plan.encoding.name}")
    if plan.compiler.records_addresses and not plan.cache.fixed_addresses:
        kinds = type(plan.compiler).__name__, type(plan.cache).__name__
        raise ValueError("{} needs a cache whose addresses stay: Static(), not {}()".format(*kinds))
    config = plan.shard.local_config(checkpoint.config)
    operations = plan.arithmetic.bind(config, plan.shard.all_reduce, device, plan.fuse_projections)
    stored = dict(encoded(checkpoint, plan, dtype, device))
    model = construct(config, stored, plan, operations, dtype).eval().requires_grad_(False)
    return Runner(checkpoint, config, plan, device, dtype, model, *plan.compiler.compile(prefill, decode, model))


def rebuild(runner: Runner, plan: Plan) -> Runner:
    """The runner's own model, its weights not copied, under a plan with another cache or compiler.

    Raises ValueError where the plan wants other weights.
    """
    if plan != replace(runner.plan, cache=plan.cache, compiler=plan.compiler):
        raise ValueError(f"the weights of {runner.plan} are not those of {plan}")
    run_prefill, run_decode = plan.compiler.compile(prefill, decode, runner.model)
    return replace(runner, plan=plan, run_prefill=run_prefill, run_decode=run_decode)


def where(device: torch.device | str | None) -> torch.device:
    """The device that is meant: None or "auto" is a GPU if there is one. ValueError for one that is not there."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = place("device", device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but this PyTorch sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device} was asked for, but this PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def construct(
    config: LlamaConfig, stored: dict[str, dict[str, Tensor]], plan: Plan, operations: Operations, dtype: torch.dtype
) -> Llama:
    """The model over stored weights, which are taken out of `stored` as they are used."""

    def projections(layer: str) -> dict[str, nn.Module]:
        modules = {}
        for role, names in JOINED.items():
            several = [stored.pop(f"{layer}.{name}") for name in names]
            modules[role] = (
                join(several, plan) if plan.fuse_projections else Separate([linear(parts, plan) for parts in several])
            )
        return modules | {role: linear(stored.pop(f"{layer}.{name}"), plan) for role, name in ALONE.items()}

    def block(layer: str) -> Block:
        norms = {norm: stored.pop(f"{layer}.{norm}")["weight"] for norm in ("attention_norm", "ffn_norm")}
        return Block(config, norms, projections(layer), operations)

    table = stored.pop("tok_embeddings")  # whole in every process: a token reads one row of it
    if config.tie_embeddings:
        embedding = plan.encoding.embedding(table, dtype)
        output = cut(table, plan.shard.part("output", table["weight"].shape, config))
    else:
        embedding, output = Plan().encoding.embedding(table, dtype), stored.pop("output")
    head = plan.shard.head(plan.encoding.linear(output), config.vocab_size)
    blocks = [block(f"layers.{i}") for i in range(config.n_layers)]
    return Llama(config, embedding, blocks, stored.pop("norm")["weight"], head)


def linear(parts: Parts, plan: Plan) -> nn.Module:
    """The module over a stored matrix. An encoding knows nothing of biases: they are added here."""
    matrix = plan.encoding.linear({part: tensor for part, tensor in parts.items() if part != "bias"})
    return Biased(matrix, parts["bias"]) if "bias" in parts else matrix


def join(several: list[dict[str, Tensor]], plan: Plan) -> Joined:
    """Matrices of one input as one: every part is concatenated along its first axis, `out`."""
    whole = {part: torch.cat([parts[part] for parts in several]) for part in several[0]}
    return Joined(linear(whole, plan), [parts["weight"].shape[0] for parts in several])
