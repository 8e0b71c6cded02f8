"""A model's matrices fitted to a text, in one forward pass in which every matrix is rounded when its inputs first come.

So a matrix is fitted to what the matrices before it, already rounded, really give; and only the dense matrices of one input
are held at a time. All rows of the text go through together, in float32.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llama_fast.caches.static import Static
from llama_fast.calibration.moments import DAMPING, Moments
from llama_fast.calibration.rounding import round_alone, round_with_feedback
from llama_fast.contracts import Encoding, KVCache
from llama_fast.model.llama import Block, Llama
from llama_fast.model.matrices import Matrix, Separate, Stored, Table
from llama_fast.plan import Plan
from llama_fast.weights import bias_of, encode_one, encoding_of
from llama_ref.checkpoint import Checkpoint
from llama_ref.config import LlamaConfig

INPUTS = {
    "qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "wo": ("attention.wo",),
    "gate_up": ("feed_forward.w1", "feed_forward.w3"),
    "w2": ("feed_forward.w2",),
}
"""The matrices of a block by what they have as their input."""

VALUES = torch.bfloat16
"""The type of what an encoding stores as floats."""


@dataclass(frozen=True)
class Fit:
    """How matrices are fitted: to `encoding` (or what the checkpoint says of a single one), with errors answered or not."""

    checkpoint: Checkpoint
    encoding: Encoding
    feedback: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notice: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if not hasattr(self.encoding, "grid"):
            raise ValueError(
                f"the encoding {self.encoding.name} cannot be fitted to a text: it is rounded to the nearest"
            )

    def dense(self, stem: str) -> Tensor:
        """One matrix [out, in] in float32."""
        return self.checkpoint.weights[f"{stem}.weight"][:].to(self.device, torch.float32)

    def rounded(self, stem: str, dtype: torch.dtype | None = torch.float32) -> Stored:
        """One matrix, or norm, by itself: each number to the nearest. What stays as it is becomes `dtype`, if that is given."""
        stored = encode_one(self.checkpoint, stem, Plan(encoding=self.encoding), dtype, self.device)
        return self.with_bias(stem, stored, dtype)

    def with_bias(self, stem: str, stored: Stored, dtype: torch.dtype | None = torch.float32) -> Stored:
        bias = bias_of(self.checkpoint, stem, Plan())
        return stored if bias is None else replace(stored, bias=bias.to(self.device, dtype or bias.dtype))

    def saved(self, stem: str, fitted: Stored | None) -> Stored:
        """What was fitted, or of the rest what is rounded or left alone, as a file shall have it."""
        if fitted is None:
            return as_saved(self.rounded(stem, None))
        return as_saved(self.with_bias(stem, fitted, None))

    def fitted(self, stems: tuple[str, ...], moments: Moments) -> list[Stored]:
        """Matrices of one input; what goes wrong with the text's moments is told by the first one's name."""
        dead = int(moments.dead.sum())
        if dead:
            self.notice(f"{stems[0]}: {dead} of {len(moments.dead)} inputs are never active in the text")
        U, damping = moments.answers() if self.feedback else (None, DAMPING)
        if damping > DAMPING:
            self.notice(f"{stems[0]}: the text's moments are singular; damped by {damping:g} of their mean")
        return [self._fitted(stem, moments, U) for stem in stems]

    def _fitted(self, stem: str, moments: Moments, U: Tensor | None) -> Stored:
        weight, encoding = self.dense(stem), encoding_of(self.checkpoint, stem, self.encoding)
        make = getattr(encoding, "grid", None)
        if make is None:  # a single matrix that is stored otherwise
            return self.rounded(stem)
        grid = make(weight, moments.cost(), VALUES)
        parts = round_alone(weight, moments.cost(), grid) if U is None else round_with_feedback(weight, U, grid)
        return self.with_bias(stem, Stored(encoding, tuple(weight.shape), parts))


class Fitting(nn.Module):
    """Matrices of one input, which are fitted to the first that comes, and multiply it as they are then stored."""

    def __init__(self, stems: tuple[str, ...], fit: Fit):
        super().__init__()
        self.stems, self.fit = stems, fit
        self.stored: dict[str, Stored] = {}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        fitted = self.fit.fitted(self.stems, Moments.of(x))
        self.stored = dict(zip(self.stems, fitted, strict=True))
        products: Tensor | tuple[Tensor, ...] = Matrix(fitted[0])(x) if len(fitted) == 1 else Separate(fitted)(x)
        return products


class FittingHead(Fitting):
    """The head: nothing follows it, so its logits, [B, T, V] of a whole text, are not made."""

    def forward(self, x: Tensor) -> Tensor:
        self.stored = dict(zip(self.stems, self.fit.fitted(self.stems, Moments.of(x)), strict=True))
        return x.new_zeros(*x.shape[:-1], 1)


def calibrated(
    fit: Fit, tokens_BT: Tensor, progress: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[str, Stored]]:
    """Every weight by name (without ".weight") as it shall be stored, fitted to a text's tokens.

    An embedding table is rounded by itself, also where it is the head as well: it is needed before its inputs are known.
    """
    config, device = fit.checkpoint.config, fit.device
    if tokens_BT.shape[1] > config.max_context:
        raise ValueError(f"rows of {tokens_BT.shape[1]} tokens exceed the model's context of {config.max_context}")
    operations = Plan().arithmetic.bind(config, Plan(), device)
    fitting: dict[str, Fitting] = {}

    def block(layer: int) -> Block:
        norms = {name: fit.rounded(f"layers.{layer}.{name}") for name in ("attention_norm", "ffn_norm")}
        matrices = {
            role: Fitting(tuple(f"layers.{layer}.{name}" for name in names), fit) for role, names in INPUTS.items()
        }
        fitting.update({f"layers.{layer}.{role}": module for role, module in matrices.items()})
        return Block(config, {name: stored.parts["weight"] for name, stored in norms.items()}, matrices, operations)

    head: nn.Module = nn.Identity() if config.tie_embeddings else FittingHead(("output",), fit)
    table = Table(fit.rounded("tok_embeddings"), torch.float32)
    blocks = [block(layer) for layer in range(config.n_layers)]
    model = Llama(config, table, blocks, fit.rounded("norm").parts["weight"], head)

    def show(stage: str, _: Tensor) -> None:
        if stage.count(".") == 1:
            progress(stage)

    with torch.no_grad():
        model(tokens_BT.to(device), None, one_layer(config, tokens_BT, device), show=show)
    if isinstance(head, FittingHead):
        fitting["output"] = head
    fitted = {stem: stored for module in fitting.values() for stem, stored in module.stored.items()}
    for name in fit.checkpoint.weights:
        stem, _, part = name.rpartition(".")
        if part == "weight":
            yield stem, fit.saved(stem, fitted.get(stem))


def one_layer(config: LlamaConfig, tokens_BT: Tensor, device: torch.device) -> KVCache:
    """A cache in which all layers are one: a block's keys and values are not needed once it is passed."""
    B, T = tokens_BT.shape
    cache = Static(length=T).allocate(replace(config, n_layers=1), B, T, torch.float32, device)
    cache.layers = cache.layers * config.n_layers
    return cache


def as_saved(stored: Stored) -> Stored:
    """Values that an encoding stores as floats, as those of 2:4, in 16 bits, whatever the original's type was."""
    weight = stored.parts["weight"]
    if stored.encoding.name == "dense" or weight.dtype is not torch.float32:
        return stored
    return replace(stored, parts={**stored.parts, "weight": weight.to(VALUES)})
