"""Model names: what may stand after `--model`, and how it becomes a checkpoint and a tokenizer.

A path that exists is always taken as that path. Otherwise `smollm2-135m` is fetched and cached,
`random:NAME[:SEED]` has random weights of a named shape, and `org/name` is asked of the Hugging Face hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama_ref.arguments import named
from llama_ref.checkpoint import Checkpoint, open_checkpoint, random_checkpoint, with_adapter
from llama_ref.config import NAMED
from llama_ref.packaged_model import SMOLLM2_135M, ModelError, fetch
from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.tokenizer import RandomTokenizer, has_tokenizer, load_tokenizer

__all__ = ["DEFAULT_MODEL", "Model", "ModelError", "open_model", "resolve"]

DEFAULT_MODEL = "smollm2-135m"
PACKAGED = {SMOLLM2_135M.name: SMOLLM2_135M}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
HUB_FACTS = ["*.json", "tokenizer.model", "*.jinja"]
HUB_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "consolidated.*.pth", "model.pth")  # the first that is there


@dataclass(frozen=True)
class Model:
    """A name resolved: files at `path`, or (where `path` is None) random weights of NAMED[shape].

    `decoded`: a plan that names no encoding takes its quantised matrices as floats.
    """

    name: str
    path: Path | None
    shape: str | None = None
    seed: int = 0
    decoded: bool = False

    def open(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        adapter: str | Path | None = None,
    ) -> Checkpoint:
        """Its checkpoint, with a LoRA directory of PEFT applied to it if one is named.

        `device` and `dtype` say where random weights are made; a file's tensors stay as stored.
        """
        if self.path is not None:
            checkpoint = open_checkpoint(self.path)
            checkpoint = replace(checkpoint, keeps_stored=False) if self.decoded else checkpoint
        else:
            assert self.shape is not None
            checkpoint = random_checkpoint(NAMED[self.shape], self.seed, device, dtype)
        return checkpoint if adapter is None else with_adapter(checkpoint, adapter)

    @property
    def has_tokenizer(self) -> bool:
        """Whether text means something to this model; where not, `tokenizer` may still give ids for bytes."""
        return self.path is not None and has_tokenizer(self.path)

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; raises TokenizerError if its directory holds none."""
        if self.path is not None:
            return load_tokenizer(self.path)
        assert self.shape is not None
        config = NAMED[self.shape]
        return RandomTokenizer(config.vocab_size, config.bos_id, config.eos_ids)


def resolve(name: str | Path = DEFAULT_MODEL) -> Model:
    """What a name stands for, downloaded if need be; raises ModelError, one line.

    resolve("random:llama-2-7b:3") -> Model("random:llama-2-7b:3", None, "llama-2-7b", 3)
    """
    name = named("model", name)
    local = Path(name).expanduser()
    if name and os.path.exists(local):  # which says no to a name that is too long, where Path.exists raises
        return Model(name, local)
    if name.startswith("random:"):
        return _random(name)
    if name in PACKAGED:
        return Model(
            name, fetch(PACKAGED[name]), decoded=True
        )  # small: faster as floats, and what the ladder starts from
    if HUB_ID.fullmatch(name) and not name.startswith(".") and not name.endswith((".gguf", ".safetensors")):
        return Model(name, _from_hub(name))
    raise ModelError(
        f"unknown model {name!r:.300}: no such file or directory; otherwise {', '.join(PACKAGED)}, org/name on the "
        f"Hugging Face hub, or random:NAME[:SEED] with NAME one of {', '.join(NAMED)}"
    )


def open_model(
    name: str = DEFAULT_MODEL, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """`resolve(name).open(device, dtype)`."""
    return resolve(name).open(device, dtype)


def _random(name: str) -> Model:
    shape, _, seed = name.removeprefix("random:").partition(":")
    if shape not in NAMED:
        raise ModelError(f"{name!r}: unknown shape {shape!r} (known: {', '.join(NAMED)})")
    if seed and not re.fullmatch(r"\d{1,18}", seed):
        raise ModelError(f"{name!r}: the seed {seed!r} is not a whole number")
    return Model(name, None, shape, int(seed or 0))


def _from_hub(name: str) -> Path:
    """The hub's client keeps the files: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT are its own, and rule."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{name!r} is no local path, and asking the Hugging Face hub needs `pip install huggingface-hub`"
        ) from error
    try:
        repository, _, revision = name.partition("@")
        for weights in HUB_WEIGHTS:  # never two copies of a model: many repositories hold several
            at = {"revision": revision} if revision else {}
            path = Path(snapshot_download(repository, allow_patterns=[*HUB_FACTS, weights], **at))
            if any(path.glob(weights)):
                return path
    except Exception as error:  # the hub's client raises its own, its HTTP library's and OSError, by version
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{name!r} is no local path, and the Hugging Face hub did not give it: {told}") from error
    raise ModelError(f"{name!r} on the Hugging Face hub holds none of {', '.join(HUB_WEIGHTS)}")
