"""The one ordered sentence: encode -> shard -> fuse -> construct -> compile.

`build(checkpoint, plan)` says it and returns a Runner: the two phases of generation, prefill and decode, over one model.
Every optimisation is applied here and nowhere else, so the order in which they compose can be read off.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llama_fast.model import Biased, Block, Joined, Llama, Separate
from llama_fast.plan import KVCache, Parts, Phase, Plan, Whole
from llama_fast.sampling import Chooser, Sampling
from llama_ref.arguments import floating, made, place, shown, whole
from llama_ref.checkpoint import Checkpoint, TensorSource
from llama_ref.config import LlamaConfig

JOINED = {"qkv": ("attention.wq", "attention.wk", "attention.wv"), "gate_up": ("feed_forward.w1", "feed_forward.w3")}
STRIPE_BYTES = 8 << 20
"""Rows of a file that are held at once to be encoded: the host's memory is for this process's part, and little more."""
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
    config = plan.shard.local_config(checkpoint.config)
    stored = dict(encoded(checkpoint, plan, dtype, device))
    model = construct(config, stored, plan, dtype).eval().requires_grad_(False)
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


def encoded(
    checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every weight as (name without ".weight", parts), one at a time: this process's part of it, encoded on `device`.

    What the encoding leaves alone becomes `dtype`; None keeps it as stored.
    """
    for name in checkpoint.weights:
        stem, _, part = name.rpartition(".")
        if part != "weight":  # read together with its weight
            continue
        parts = encode_one(checkpoint, stem, plan, dtype, device)
        bias = bias_of(checkpoint, stem, plan)
        yield stem, parts if bias is None else parts | {"bias": bias.to(device, dtype or bias.dtype)}


def encode_one(
    checkpoint: Checkpoint, stem: str, plan: Plan, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """The parts of one weight. Of rows only this process's are read; where columns are cut, whole rows, a stripe at a time."""
    weights, config, encoding = checkpoint.weights, checkpoint.config, plan.encoding
    source = weights[f"{stem}.weight"]
    scale = weights.get(f"{stem}.scale")
    part = plan.shard.part(stem, source.shape, config)
    if scale is not None:
        return {name: read.to(device) for name, read in cut({"weight": source, "scale": scale}, part).items()}
    kept = dtype or source.dtype
    if not is_encoded(stem, config):
        return {"weight": read(source, part).to(device).to(kept)}
    if encoding.name == "dense":
        return encoding.encode(read(source, part).to(device), kept)
    # A scale is that of the whole row, whichever columns of it are kept here: so all processes hold one matrix's numbers.
    first, stop, _ = part[0].indices(source.shape[0])
    on_file = not hasattr(source, "device")  # what has a device is in its memory, or drawn there whole
    rows = max(1, STRIPE_BYTES // (source.shape[1] * source.dtype.itemsize)) if on_file else max(1, stop)
    parts: dict[str, Tensor] = {}
    for row in range(first, stop, rows):
        stripe = encoding.encode(source[row : min(row + rows, stop)].to(device), kept)
        for name, tensor in cut(stripe, (slice(None), part[1])).items():
            if row == first:  # laid out whole before anything else is, so that what a stripe needs is given back
                parts[name] = tensor.new_empty(stop - first, *tensor.shape[1:])
            parts[name][row - first : row - first + len(tensor)] = tensor
    return parts


def bias_of(checkpoint: Checkpoint, stem: str, plan: Plan) -> Tensor | None:
    """This process's part of a bias [out]: cut with its weight's rows. Where columns are cut, products are summed over the
    processes, and the bias must come in once: from the one that holds the first column."""
    source = checkpoint.weights.get(f"{stem}.bias")
    if source is None:
        return None
    shape = checkpoint.weights[f"{stem}.weight"].shape
    rows, columns = plan.shard.part(stem, shape, checkpoint.config)
    bias = read(source, (rows,))
    return bias if columns.indices(shape[1])[0] == 0 else torch.zeros_like(bias)


def read(source: TensorSource, part: tuple[slice, ...]) -> Tensor:
    """A part of a stored tensor; contiguous, and not a window that keeps the whole alive."""
    return source[part].contiguous()


def cut(parts: Mapping[str, TensorSource], part: tuple[slice, ...]) -> dict[str, Tensor]:
    """A part of an encoded matrix: every tensor along the weight's axes, unless it has length 1 there.

    A scale [out, groups] is cut where the weight is; ValueError where that would part a group.
    """
    shape = parts["weight"].shape
    return {
        name: read(held, tuple(rescaled(*axis) for axis in zip(part, shape, held.shape)))
        for name, held in parts.items()
    }


def rescaled(part: slice, size: int, length: int) -> slice:
    """A slice of an axis of `size` as one of `length` entries: (64:128 of 256, 4) -> 1:2; (64:128 of 256, 1) -> all."""
    if length == 1:
        return slice(None)
    start, stop, _ = part.indices(size)
    if start * length % size or stop * length % size:
        raise ValueError(f"columns {start} to {stop} of {size} part one of {length} groups")
    return slice(start * length // size, stop * length // size)


def is_encoded(stem: str, config: LlamaConfig) -> bool:
    """Whether the plan's encoding holds this weight: every matrix that is read whole for every token.

    The norms are vectors, and of an untied embedding table a token reads one row: these stay as they are.
    """
    return not stem.endswith("norm") and (stem != "tok_embeddings" or config.tie_embeddings)


def construct(config: LlamaConfig, stored: dict[str, dict[str, Tensor]], plan: Plan, dtype: torch.dtype) -> Llama:
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
        return Block(config, norms, projections(layer), plan.shard.all_reduce)

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


def prefill(
    model: nn.Module, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache, choose: Chooser
) -> tuple[Tensor, Tensor]:
    """Phase one: all prompts at once, padded on the right. The next token [B] and its logits [B, V] of each row."""
    logits_BV = model(tokens_BT, None, cache, last_B=lengths_B - 1)[:, 0]
    return choose(logits_BV, lengths_B), logits_BV


def decode(
    model: nn.Module, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Chooser
) -> tuple[Tensor, Tensor]:
    """Phase two: the tokens just chosen (T = 1) or proposed (T > 1). The next token [B] and all logits [B, T, V]."""
    logits_BTV = model(tokens_BT, start_B, cache)
    return choose(logits_BTV[:, -1], start_B + tokens_BT.shape[1]), logits_BTV


class DecodedWeights(Mapping[str, Tensor]):
    """Canonical dense weights with exactly the numbers that a runner computes with, made anew at every access."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self._names = [name for name in runner.checkpoint.weights if not name.endswith(".scale")]

    def __getitem__(self, name: str) -> Tensor:
        r, stem = self._runner, name.removesuffix(".weight")
        if name.endswith(".bias"):
            return r.checkpoint.weights[name][:].to(r.device, r.dtype)
        parts = encode_one(r.checkpoint, stem, replace(r.plan, shard=Whole()), r.dtype, r.device)
        return r.plan.encoding.decode(parts) if is_encoded(stem, r.checkpoint.config) else parts["weight"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Runner:
    """A built model and its two phases. `config` holds the shapes of this process's shard."""

    checkpoint: Checkpoint
    config: LlamaConfig
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    model: Llama
    run_prefill: Phase
    run_decode: Phase

    def allocate(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` rows of up to `length` positions; ValueError beyond the model's context."""
        batch, length = whole("batch", batch, 1), whole("length", length, 1)
        if length > self.config.max_context:
            raise ValueError(f"{length} positions exceed the model's context of {self.config.max_context}")
        return self.plan.cache.allocate(self.config, batch, length, self.dtype, self.device)

    @torch.no_grad()
    def start(self, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache, choose: Chooser) -> tuple[Tensor, Tensor]:
        """Prefill: the first new token [B] and the logits [B, V] it was chosen from."""
        cache.reserve(torch.zeros_like(lengths_B), tokens_BT.shape[1])
        return self.run_prefill(self.model, tokens_BT, lengths_B, cache, choose)

    @torch.no_grad()
    def step(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache, choose: Chooser) -> tuple[Tensor, Tensor]:
        """Decode: the next token [B] and the logits [B, T, V] of all T."""
        cache.reserve(start_B, tokens_BT.shape[1])
        return self.run_decode(self.model, tokens_BT, start_B, cache, choose)

    @torch.no_grad()
    def extend(
        self, tokens_BT: Tensor, start_B: Tensor, lengths_B: Tensor, cache: KVCache, choose: Chooser
    ) -> tuple[Tensor, Tensor]:
        """Prefill behind the start_B positions that the cache already holds; `lengths_B` counts the new tokens.

        The next token [B] and its logits [B, V]. Not compiled: every length would be compiled anew.
        """
        cache.reserve(start_B, tokens_BT.shape[1])
        logits_BV = self.model(tokens_BT, start_B, cache, last_B=lengths_B - 1)[:, 0]
        return choose(logits_BV, start_B + lengths_B), logits_BV

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, cache: KVCache) -> Tensor:
        """The logits [B, V] at each row's last token."""
        return self.start(tokens_BT, lengths_B, cache, self._greedy(tokens_BT))[1]

    def decode(self, tokens_BT: Tensor, start_B: Tensor, cache: KVCache) -> Tensor:
        """The logits [B, T, V] of tokens at positions start_B, start_B + 1, ..."""
        return self.step(tokens_BT, start_B, cache, self._greedy(tokens_BT))[1]

    @torch.no_grad()
    def score(self, tokens_BT: Tensor) -> Tensor:
        """The logits [B, T, V] of whole sequences, not compiled."""
        B, T = tokens_BT.shape
        cache = self.allocate(B, T)
        cache.reserve(torch.zeros(B, dtype=torch.int64), T)
        return self.model(tokens_BT, None, cache)  # type: ignore[no-any-return]

    def prepared(self, choose: Chooser, positions: int) -> Chooser:
        """`choose`, for a request of so many positions: where no compiler merges them, uniforms are hashed at once, and tokens
        chosen by the kernels that the plan has.
        """
        if not self.plan.compiler.compiles_each_shape:
            choose.look_ahead(positions)
            choose.kernels = self.plan.compiler.choosing
        return choose

    def reference_weights(self) -> Mapping[str, Tensor]:
        """decode(encode(w)) under canonical names: what a reference must compute with to be comparable."""
        return DecodedWeights(self)

    def _greedy(self, tokens_BT: Tensor) -> Chooser:
        return Chooser(Sampling(), [0] * tokens_BT.shape[0], self.device)
