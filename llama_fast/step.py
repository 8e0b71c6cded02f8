"""Where the tokens of one forward pass stand, and who looks on: what a model hands from one part to the next.

Shapes: B batch, T tokens, S cache slots, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Show = Callable[[str, Tensor], None]
"""Is given a stage's name and its value."""


class Step(NamedTuple):
    """Where the tokens of one forward pass stand. An arithmetic fills in what it needs."""

    start_B: Tensor | None
    """The position of each row's first token; None: 0, with nothing before."""
    position_BT: Tensor | None = None
    mask_BTS: Tensor | None = None
    """Which slots a token sees; None: those of the T tokens themselves, and causal."""
    cos_sin_BTd2: Tensor | None = None
    """Cosine and sine of each position's angles."""
    slots_BT: Tensor | None = None
    """Where each token's keys stand in a pool of pages."""
    show: Show | None = None
    name: str = ""
    """The part of the model that the step is in."""

    def part(self, name: str) -> Step:
        """The same step in a part of the model: "layers.3", and in that "ffn_out" is "layers.3.ffn_out"."""
        return self if self.show is None else self._replace(name=f"{self.name}.{name}".lstrip("."))

    def see(self, **stages: Tensor) -> None:
        """Show stages of this part: in "layers.3" see(q=q) shows "layers.3.q"."""
        for stage, value in stages.items() if self.show is not None else ():
            self.part(stage).see_part(value)

    def see_part(self, value: Tensor) -> None:
        """Show what this part as a whole gives."""
        if self.show is not None:
            self.show(self.name, value)
