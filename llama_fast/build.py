"""The one ordered sentence: encode -> shard -> fuse -> construct -> compile.

`build(checkpoint, plan)` says it and returns a Runner: the two phases of generation, prefill and decode, over one model.
Every optimisation is applied here and nowhere else, so the order in which they compose can be read off.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from llama_fast.contracts import Operations
from llama_fast.devices import default_dtype, where
from llama_fast.encodings.tiled import laid_in_tiles
from llama_fast.engine.runner import Runner, phases_of
from llama_fast.model.llama import Block, Llama
from llama_fast.model.matrices import Joined, Matrix, Separate, Stored, Table, apart
from llama_fast.plan import Plan
from llama_fast.weights import Arriving, check_weights, encoded, share_of
from llama_ref.arguments import floating, made, shown
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
    check_weights(checkpoint, plan, dtype)
    config = plan.shard.local_config(checkpoint.config)
    operations = plan.arithmetic.bind(config, plan, device)
    if checkpoint.low_rank and not operations.compilable:
        raise ValueError(
            f"the fused kernels add no adapter to {checkpoint.encoding} weights: adapt the dense model, or take Compiled()"
        )
    stored = Arriving(encoded(checkpoint, plan, dtype, device))
    model = construct(checkpoint.config, stored, plan, operations, dtype).eval().requires_grad_(False)
    phases = plan.compiler.compile(*phases_of(plan.shard), model)
    return Runner(checkpoint, config, plan, device, dtype, model, *phases)


def rebuild(runner: Runner, plan: Plan) -> Runner:
    """The runner's own model, its weights not copied, under a plan with another cache or compiler.

    Raises ValueError where the plan wants other weights, or cannot be built.
    """
    if plan != replace(runner.plan, cache=plan.cache, compiler=plan.compiler):
        raise ValueError(f"the weights of {runner.plan} are not those of {plan}")
    check_addresses(plan)
    plan.arithmetic.bind(runner.config, plan, runner.device)  # refuses a cache that its kernels cannot write
    run_prefill, run_decode = plan.compiler.compile(*phases_of(plan.shard), runner.model)
    return replace(runner, plan=plan, run_prefill=run_prefill, run_decode=run_decode)


def check_addresses(plan: Plan) -> None:
    """ValueError for a compiler that records addresses over a cache that does not keep them."""
    if plan.compiler.records_addresses and not plan.cache.fixed_addresses:
        kinds = type(plan.compiler).__name__, type(plan.cache).__name__
        raise ValueError("{} needs a cache whose addresses stay: Static(), not {}()".format(*kinds))


def construct(whole: LlamaConfig, stored: Arriving, plan: Plan, operations: Operations, dtype: torch.dtype) -> Llama:
    """This process's part of the model `whole` over stored weights, which are taken out of `stored` as they are used."""
    config, layers = plan.shard.local_config(whole), plan.shard.layers(whole)
    embeds, ends = plan.shard.ends
    tied = config.tie_embeddings
    # whole where tokens are embedded, of which each reads a row; behind the first stage, of a tied one, what the head is
    table = stored.pop("tok_embeddings") if embeds or (ends and tied) else None
    separate: list[str] = []

    def lay(stored: Stored) -> Stored:
        """On a CPU rows stand in tiles with their neighbours; behind joining."""
        on_cpu = next(iter(stored.parts.values())).device.type == "cpu"
        return laid_in_tiles(stored) if operations.compilable and on_cpu else stored

    def matrix(stored: Stored) -> Matrix:
        return Matrix(lay(stored))

    def join(layer: str, names: Sequence[str]) -> nn.Module:
        """One product, unless the matrices are stored in several ways."""
        several = [stored.pop(f"{layer}.{name}") for name in names]
        why = "" if operations.needs_joined or not plan.fuse_projections else apart(several)
        if why:
            separate.append(f"{layer}: {why}")
        return (Joined if plan.fuse_projections and not why else Separate)(several, matrix)

    def block(layer: str) -> Block:
        norms = {norm: stored.pop(f"{layer}.{norm}").parts["weight"] for norm in ("attention_norm", "ffn_norm")}
        projections: dict[str, nn.Module] = {role: join(layer, names) for role, names in JOINED.items()}
        projections |= {role: matrix(stored.pop(f"{layer}.{name}")) for role, name in ALONE.items()}
        return Block(config, norms, projections, operations)

    blocks = [block(f"layers.{i}") for i in layers]
    norm = stored.pop("norm").parts["weight"] if ends else None
    output: Stored | None = None
    if ends and not tied:
        output = stored.pop("output")
    elif ends and table is not None:
        output = share_of(table, "output", plan, config) if embeds else table
    one = output is not None and table is not None and tied and output.shape == table.shape
    table = None if table is None else lay(table)
    output = table if one else None if output is None else lay(output)
    embedding = Table(table, dtype) if embeds and table is not None else None
    head = None if output is None else plan.shard.head(Matrix(output), config.vocab_size)
    if separate and plan.encoding.name != "stored":  # a GGUF file mixes types as a rule
        told = f"{len(separate)} groups of projections are not joined but multiplied one by one, the first in {separate[0]}"
        warnings.warn(told, stacklevel=3)
    return Llama(config, embedding, blocks, norm, head, layers[0])
