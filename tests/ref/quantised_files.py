"""Tiny models as other tools store them: packed here by the documented rules, beside the numbers that they mean.

`write(directory, kind)` writes one of KINDS and returns the float64 matrix of every module, computed from the integers before
they are packed. That the tools themselves pack so is held by tests/ref/quantised/*.safetensors, which they wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_ref.config import LlamaConfig
from llama_ref.formats.hf_config import to_hf
from llama_ref.formats.huggingface import huggingface_name
from llama_ref.random_weights import random_checkpoint
from llama_ref.weights import expected_shapes

CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=101, max_context=64
)
E4M3 = torch.float8_e4m3fn
Quantise = Callable[[int, int, torch.Generator, str], tuple[dict[str, Tensor], Tensor]]
"""(out, in, generator, module) -> (the tensors as a tool stores them, the matrix that they mean)."""


@dataclass
class Drawn:
    """Random integers of one matrix [out, in], with scales and zero points [out, groups]."""

    out: int
    columns: int
    bits: int
    group: int
    generator: torch.Generator
    symmetric: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups, most = -(-self.columns // self.group), 1 << self.bits
        shape = self.out, self.columns
        self.number = torch.randint(0, most, shape, generator=self.generator)
        self.zero = torch.randint(1, most, (self.out, groups), generator=self.generator)
        if self.symmetric:
            self.zero = torch.full_like(self.zero, most // 2)
        self.scale = (torch.rand(self.out, groups, generator=self.generator) * 0.05 + 0.01).half()
        self.of_column = torch.arange(self.columns) // self.group

    @property
    def exact(self) -> Tensor:
        """What the integers mean, float64."""
        zero, scale = self.zero[:, self.of_column], self.scale[:, self.of_column]
        return (self.number - zero).double() * scale.double()


def words(numbers: Tensor, bits: int) -> Tensor:
    """A stream of bits along the last axis, as int32: by Python's own integers, not by the reader's way."""
    flat = numbers.reshape(-1, numbers.shape[-1]).tolist()
    count = -(-numbers.shape[-1] * bits // 32)
    rows = []
    for row in flat:
        whole = sum(number << (bits * i) for i, number in enumerate(row))
        rows.append([(whole >> (32 * i)) & 0xFFFF_FFFF for i in range(count)])
    return signed_words(rows).reshape(*numbers.shape[:-1], count)


def signed_words(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[word - (1 << 32) if word >> 31 else word for word in row] for row in rows], dtype=torch.int32)


def gptq(drawn: Drawn, version: int = 1, order: bool = False) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx; `order`: the columns of a group stand anywhere."""
    if order:
        drawn.of_column = drawn.of_column[torch.randperm(drawn.columns, generator=drawn.generator)]
    zero = drawn.zero - 1 if version == 1 else drawn.zero
    return {
        "qweight": words(drawn.number, drawn.bits).T.contiguous(),
        "qzeros": words(zero.T.contiguous(), drawn.bits),
        "scales": drawn.scale.T.contiguous(),
        "g_idx": drawn.of_column.int(),
    }


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(drawn: Drawn) -> dict[str, Tensor]:
    def pack(rows: Tensor) -> Tensor:
        return words(rows.T.contiguous().unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4)

    return {"qweight": pack(drawn.number), "qzeros": pack(drawn.zero), "scales": drawn.scale.T.contiguous()}


def pack_quantized(drawn: Drawn) -> dict[str, Tensor]:
    zero = {} if drawn.symmetric else {"weight_zero_point": words(drawn.zero.T.contiguous(), drawn.bits).T.contiguous()}
    return {
        "weight_packed": words(drawn.number, drawn.bits),
        "weight_scale": drawn.scale,
        "weight_shape": torch.tensor([drawn.out, drawn.columns]),
        **zero,
    }


def int_quantized(drawn: Drawn) -> dict[str, Tensor]:
    middle = 1 << (drawn.bits - 1)
    zero = {} if drawn.symmetric else {"weight_zero_point": (drawn.zero - middle).to(torch.int8)}
    return {"weight": (drawn.number - middle).to(torch.int8), "weight_scale": drawn.scale, **zero}


def torchao_intx(drawn: Drawn) -> dict[str, Tensor]:
    middle = 1 << (drawn.bits - 1)
    return {
        "_weight_qdata": (drawn.number - middle).to(torch.int8),
        "_weight_scale": drawn.scale,
        "_weight_zero_point": (drawn.zero - middle).to(torch.int8),
    }


def older_words(numbers: Tensor, bits: int) -> Tensor:
    """As many whole numbers a word as fit."""
    each = 32 // bits
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % each))
    return words(padded.unflatten(-1, (-1, each)), bits).flatten(-2)


def older_pack_quantized(drawn: Drawn) -> dict[str, Tensor]:
    zero = older_words(drawn.zero.T.contiguous(), drawn.bits).T.contiguous()
    return pack_quantized(drawn) | {"weight_packed": older_words(drawn.number, drawn.bits), "weight_zero_point": zero}


def early_pack_quantized(drawn: Drawn) -> dict[str, Tensor]:
    return pack_quantized(drawn) | {"weight_zero_point": (drawn.zero - (1 << (drawn.bits - 1))).to(torch.int8)}


def ordered_pack_quantized(drawn: Drawn) -> dict[str, Tensor]:
    drawn.of_column = drawn.of_column[torch.randperm(drawn.columns, generator=drawn.generator)]
    return pack_quantized(drawn) | {"weight_g_idx": drawn.of_column.int()}


def ct(weights: dict[str, Any], form: str, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **more}


@dataclass(frozen=True)
class Kind:
    """How a tool stores matrices: its config, what is drawn, how it is packed, and the encoding that holds it."""

    settings: dict[str, Any]
    bits: int
    group: int  # 0: a row
    pack: Callable[[Drawn], dict[str, Tensor]]
    encoding: str
    symmetric: bool = False


def gptq_settings(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": False, **more}


def _int(bits: int, symmetric: bool, group: int | None, strategy: str = "group") -> dict[str, Any]:
    size = {"group_size": group} if group else {}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **size}


KINDS = {
    "gptq": Kind(gptq_settings(4, 32), 4, 32, gptq, "int4-g32-zero"),
    "gptq-sym": Kind(gptq_settings(4, 64, sym=True), 4, 64, gptq, "int4-g64", symmetric=True),
    "gptq-v2": Kind(
        gptq_settings(4, 32, checkpoint_format="gptq_v2"), 4, 32, lambda drawn: gptq(drawn, 2), "int4-g32-zero"
    ),
    "gptq-order": Kind(
        gptq_settings(4, 32, desc_act=True), 4, 32, lambda drawn: gptq(drawn, order=True), "int4-g32-zero-order"
    ),
    "gptq-8": Kind(gptq_settings(8, 32), 8, 32, gptq, "int8-g32-zero"),
    "gptq-8-row": Kind(gptq_settings(8, -1, sym=True), 8, 0, gptq, "int8", symmetric=True),
    "gptq-8-order": Kind(
        gptq_settings(8, 16, desc_act=True), 8, 16, lambda drawn: gptq(drawn, order=True), "int8-g16-zero-order"
    ),
    "gptq-3": Kind(gptq_settings(3, 32), 3, 32, gptq, "int4-g32-zero"),
    "gptq-2": Kind(gptq_settings(2, 64, sym=True), 2, 64, gptq, "int4-g64", symmetric=True),
    "gptq-short-group": Kind(gptq_settings(4, 48), 4, 48, gptq, "int8-g16-zero"),
    "awq": Kind(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        4,
        32,
        awq,
        "int4-g32-zero",
    ),
    "ct-4": Kind(ct(_int(4, True, 32), "pack-quantized"), 4, 32, pack_quantized, "int4-g32", symmetric=True),
    "ct-4-zero": Kind(ct(_int(4, False, 32), "pack-quantized"), 4, 32, pack_quantized, "int4-g32-zero"),
    "ct-4-row": Kind(ct(_int(4, False, None, "channel"), "pack-quantized"), 4, 0, pack_quantized, "int4-g64-zero"),
    "ct-8": Kind(ct(_int(8, True, 32), "pack-quantized"), 8, 32, pack_quantized, "int8-g32", symmetric=True),
    "ct-3": Kind(ct(_int(3, False, 64), "pack-quantized"), 3, 64, pack_quantized, "int4-g64-zero"),
    "ct-3-older": Kind(ct(_int(3, False, 64), "pack-quantized"), 3, 64, older_pack_quantized, "int4-g64-zero"),
    "ct-4-early": Kind(ct(_int(4, False, 32), "pack-quantized"), 4, 32, early_pack_quantized, "int4-g32-zero"),
    "ct-4-order": Kind(ct(_int(4, False, 32), "pack-quantized"), 4, 32, ordered_pack_quantized, "int4-g32-zero-order"),
    "ct-6": Kind(ct(_int(6, False, 16), "pack-quantized"), 6, 16, pack_quantized, "int8-g16-zero"),
    "ct-int8": Kind(ct(_int(8, True, None, "channel"), "int-quantized"), 8, 0, int_quantized, "int8", symmetric=True),
    "ct-int8-zero": Kind(ct(_int(8, False, None, "channel"), "int-quantized"), 8, 0, int_quantized, "int8-zero"),
    "torchao-intx": Kind({"quant_method": "torchao", "quant_type": {}}, 4, 32, torchao_intx, "int4-g32-zero"),
}


def fp8(scale_shape: str, name: str) -> Quantise:
    """Draws e4m3 matrices whose scales are a "tensor"'s, "rows" or "blocks" of 48 x 32."""

    def quantise(out: int, columns: int, generator: torch.Generator, _: str) -> tuple[dict[str, Tensor], Tensor]:
        weight = torch.randn(out, columns, generator=generator).to(E4M3)
        shapes = {
            "number": (),
            "tensor": (1,),
            "rows": (out, 1),
            "vector": (out,),
            "blocks": (-(-out // 48), -(-columns // 32)),
        }
        scale = torch.rand(shapes[scale_shape], generator=generator) + 0.5
        spread = scale.reshape(-1, scale.shape[-1]) if scale.dim() == 2 else scale.reshape(-1, 1)
        if scale_shape == "blocks":
            spread = scale.repeat_interleave(48, 0)[:out].repeat_interleave(32, 1)[:, :columns]
        parts = {"weight": weight, name: scale, "input_scale": torch.ones(1)}
        return parts, (weight.float() * spread).expand(out, columns)

    return quantise


DENSE = ("model.embed_tokens", "lm_head", "norm", "layernorm")


def write(directory: Path, kind: str, config: LlamaConfig = CONFIG) -> dict[str, Tensor]:
    """A directory of this kind; module -> its matrix, float64, in the file's own order of rows."""
    of = KINDS[kind]

    def quantise(out: int, columns: int, generator: torch.Generator, name: str) -> tuple[dict[str, Tensor], Tensor]:
        drawn = Drawn(out, columns, of.bits, of.group or columns, generator, of.symmetric)
        packed = of.pack(drawn)
        return packed, drawn.exact

    return write_matrices(directory, of.settings, quantise, config)


def write_matrices(
    directory: Path,
    settings: dict[str, Any],
    quantise: Quantise,
    config: LlamaConfig = CONFIG,
    headers: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """The same with (tensors, matrix) of every linear module from `quantise(out, in, generator, module)`.

    Without tensors it stays dense. `headers`, filled in by then, are what torchao states in the header, by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    generator, stored, exact, metadata = torch.Generator().manual_seed(3), {}, {}, {"format": "pt"}
    plain = random_checkpoint(config, 4).weights
    for name, shape in expected_shapes(config).items():
        full = huggingface_name(name)
        module = full.removesuffix(".weight")
        if module.endswith(DENSE):
            stored[full] = exact[module] = plain[name][:].clone()
            continue
        tensors, exact[module] = quantise(*shape, generator, module)
        if not tensors:
            stored[full] = exact[module]
        stored |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        if headers and full in headers:
            metadata[full] = headers[full]
        elif "_weight_qdata" in tensors:
            metadata[full] = json.dumps(torchao_header(tensors, shape))
    save_file(stored, directory / "model.safetensors", metadata=metadata)
    described = to_hf(config) | {"quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(described))
    return exact


def torchao_header(tensors: dict[str, Tensor], shape: tuple[int, ...]) -> dict[str, Any]:
    """What torchao states of one tensor; of integers those of four bits."""
    rows, groups = tensors["_weight_scale"].shape
    block = [shape[0] // rows, shape[1] // groups]
    if tensors["_weight_qdata"].dtype is E4M3:
        return {"_type": "Float8Tensor", "_data": {"block_size": block}}
    target = {"_type": "torch.dtype", "_data": "int4"}
    return {"_type": "IntxUnpackedToInt8Tensor", "_data": {"block_size": block, "target_dtype": target}}
