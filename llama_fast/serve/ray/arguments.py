"""What `serve run llama_fast.serve.ray:app` is told after the name, or a Serve config under `args`: key=value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import click
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_fast.serve.door import Limits, check_key
from llama_fast.serve.setup import Setup
from llama_ref.models import DEFAULT_MODEL

SETUP = (
    "model",
    "rows",
    "length",
    "cache",
    "cache_tokens",
    "cache_bits",
    "chunk",
    "chat_template",
    "encoding",
    "compile",
    "fused",
    "dtype",
)
"""Arguments that `Setup` has too."""


class Refused(click.ClickException, ValueError):
    """Arguments that cannot be served: one line at Ray's command line, a ValueError elsewhere."""


class Arguments(BaseModel):
    """Those of `llama-fast serve`, by the names of its flags, and those of the replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = DEFAULT_MODEL
    name: str | None = None
    rows: int = Field(8, ge=1)
    length: int | None = Field(None, ge=4)
    cache: str | None = None
    cache_tokens: int | None = Field(None, ge=1)
    cache_bits: Literal[8] | None = None
    chunk: int | None = Field(None, ge=1)
    chat_template: str | None = None
    encoding: str | None = None
    compile: bool = False
    fused: bool = False
    device: Literal["cpu", "cuda"] | None = None
    """None: GPUs, if this process sees one."""
    dtype: str | None = None
    api_key: str | None = Field(default_factory=lambda: os.environ.get("LLAMA_FAST_API_KEY"))
    max_body: int = Field(Limits.max_body, ge=1)
    max_queue: int = Field(Limits.max_queue, ge=0)
    timeout: float = Field(Limits.timeout, gt=0, allow_inf_nan=False)
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = None
    """More than `replicas` where Ray is to add and to take away by the load."""
    ranks: int = Field(1, ge=1)
    """GPUs that hold one replica together, by tensor parallelism; on a CPU processes."""
    cpus: int = Field(1, ge=1)
    """Cores that each rank reserves and computes with."""
    gateways: int = Field(1, ge=1)
    placement: Literal["balanced", "prefix"] = "balanced"
    """Where requests go: to the less busy of two replicas, or to the one that has read such a beginning before."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda" or (self.device is None and torch.cuda.is_available())

    @property
    def limits(self) -> Limits:
        return Limits(self.max_body, self.timeout, self.max_queue)

    @property
    def setup(self) -> Setup:
        """What each replica is. Its device is named, so that none computes on a CPU because its node has no GPU."""
        device = "cuda" if self.on_gpu else "cpu"
        return Setup(**{name: getattr(self, name) for name in SETUP}, device=device)

    @property
    def waiting(self) -> int:
        """Requests that a replica takes beyond its rows, so that no row idles while Ray finds the next request."""
        return (self.rows + 1) // 2


def read(given: Mapping[str, Any]) -> Arguments:
    """The arguments; Refused, which names the first that is wrong."""
    try:
        found = Arguments.model_validate(dict(given))
        if found.max_replicas is not None and found.max_replicas < found.replicas:
            raise ValueError(f"max_replicas={found.max_replicas} must be at least replicas={found.replicas}")
        check_key("api_key", found.api_key)
        _ = found.setup  # what contradicts itself is said here
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = f" (known: {', '.join(Arguments.model_fields)})" if first["type"] == "extra_forbidden" else ""
        said = "unknown argument" if known else f"{first['input']!r:.80}: {first['msg']}"
        raise Refused(f"{where}: {said}{known}") from None
    except ValueError as error:
        raise Refused(str(error)) from None
    return found
