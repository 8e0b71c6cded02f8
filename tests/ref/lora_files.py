"""A LoRA directory of drawn numbers, written without peft, for tests that apply one and do not ask what it means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llama_ref.config import LlamaConfig
from llama_ref.formats.huggingface import huggingface_name
from llama_ref.weights import expected_shapes

EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    directory: Path, config: LlamaConfig, modules: Sequence[str] = EVERY_LINEAR, r: int = 3, **fields: Any
) -> Path:
    """A directory with a pair of rank `r` for each of the modules; `fields` go into its config. The directory."""
    random = torch.Generator().manual_seed(11)
    tensors = {}
    for name, (rows, *columns) in expected_shapes(config).items():
        stem = huggingface_name(name).removesuffix(".weight")
        if not columns or stem.rpartition(".")[2] not in modules:
            continue
        down, up = ("lora_A.weight", (r, columns[0])), ("lora_B.weight", (rows, r))
        if stem.endswith("embed_tokens"):
            down, up = ("lora_embedding_A", (r, rows)), ("lora_embedding_B", (columns[0], r))
        lengths = [("lora_magnitude_vector", (rows,))] if fields.get("use_dora") else []
        for part, shape in (down, up, *lengths):
            tensors[f"base_model.model.{stem}.{part}"] = 0.3 * torch.randn(shape, generator=random)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    stated = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": list(modules),
    }
    (directory / "adapter_config.json").write_text(json.dumps(stated | fields))
    return directory
