"""The one ordered sentence: encode -> shard -> fuse -> construct -> compile.

`build(checkpoint, plan)` says it and returns a Runner: the two phases of generation, prefill and decode, over one model.
Every optimisation is applied here and nowhere else, so the order in which they compose can be read off.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from llama_fast.contracts import Operations, Stored
from llama_fast.engine.runner import Runner, decode, prefill
from llama_fast.model.llama import Block, Llama
from llama_fast.model.matrices import Joined, Matrix, Separate, Table, apart
from llama_fast.plan import Plan
from llama_fast.recipes import encoding_named
from llama_fast.weights import check_encoded, encoded, share_of
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
    check_addresses(plan)
    check_encoded(checkpoint, plan.encoding)
    config = plan.shard.local_config(checkpoint.config)
    operations = bind(checkpoint, config, plan, device)
    stored = dict(encoded(checkpoint, plan, dtype, device))
    model = construct(config, stored, plan, operations, dtype).eval().requires_grad_(False)
    return Runner(checkpoint, config, plan, device, dtype, model, *plan.compiler.compile(prefill, decode, model))


def rebuild(runner: Runner, plan: Plan) -> Runner:
    """The runner's own model, its weights not copied, under a plan with another cache or compiler.

    Raises ValueError where the plan wants other weights, or cannot be built.
    """
    if plan != replace(runner.plan, cache=plan.cache, compiler=plan.compiler):
        raise ValueError(f"the weights of {runner.plan} are not those of {plan}")
    check_addresses(plan)
    plan.arithmetic.bind(runner.config, plan, runner.device)  # refuses a cache that its kernels cannot write
    run_prefill, run_decode = plan.compiler.compile(prefill, decode, runner.model)
    return replace(runner, plan=plan, run_prefill=run_prefill, run_decode=run_decode)


def check_addresses(plan: Plan) -> None:
    """ValueError for a compiler that records addresses over a cache that does not keep them."""
    if plan.compiler.records_addresses and not plan.cache.fixed_addresses:
        kinds = type(plan.compiler).__name__, type(plan.cache).__name__
        raise ValueError("{} needs a cache whose addresses stay: Static(), not {}()".format(*kinds))


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


def bind(checkpoint: Checkpoint, config: LlamaConfig, plan: Plan, device: torch.device) -> Operations:
    """The operations of the plan's arithmetic; ValueError, by name, for an encoding that it cannot read, also of one matrix."""
    for name in sorted(set(checkpoint.encodings.values()) - {plan.encoding.name}):
        plan.arithmetic.bind(config, replace(plan, encoding=encoding_named(name)), device)
    return plan.arithmetic.bind(config, plan, device)


def construct(
    config: LlamaConfig, stored: dict[str, Stored], plan: Plan, operations: Operations, dtype: torch.dtype
) -> Llama:
    """The model over stored weights, which are taken out of `stored` as they are used."""
    separate: list[str] = []

    def join(layer: str, names: Sequence[str]) -> nn.Module:
        several = [stored.pop(f"{layer}.{name}") for name in names]
        if not plan.fuse_projections:
            return Separate(several)
        why = "" if operations.needs_joined else apart(several)
        if not why:
            return Joined(several)
        separate.append(f"{layer}: {why}")
        return Separate(several)

    def block(layer: str) -> Block:
        norms = {norm: stored.pop(f"{layer}.{norm}").parts["weight"] for norm in ("attention_norm", "ffn_norm")}
        projections: dict[str, nn.Module] = {role: join(layer, names) for role, names in JOINED.items()}
        projections |= {role: Matrix(stored.pop(f"{layer}.{name}")) for role, name in ALONE.items()}
        return Block(config, norms, projections, operations)

    table = stored.pop("tok_embeddings")  # whole in every process: a token reads one row of it
    output = share_of(table, "output", plan, config) if config.tie_embeddings else stored.pop("output")
    head = plan.shard.head(Matrix(output), config.vocab_size)
    blocks = [block(f"layers.{i}") for i in range(config.n_layers)]
    if separate:
        told = f"{len(separate)} groups of projections are not joined but multiplied one by one, the first in {separate[0]}"
        warnings.warn(told, stacklevel=3)
    return Llama(config, Table(table, dtype), blocks, stored.pop("norm").parts["weight"], head)
