"""Tiny models written by the quantisation tools themselves: ours must decode to their numbers; one matrix of each is recorded.

    pip install --no-deps compressed-tensors==0.20.1 loguru torchao==0.18.0
    pip install --no-deps pypcre device-smi tokenicer logbar threadpoolctl defuser
    PYTHONPATH=GPTQMODEL:AUTOAWQ python -m tests.instruments.record_quantised [--record]

GPTQMODEL and AUTOAWQ are the unpacked sources of gptqmodel 7.7.0 and autoawq 0.2.9, of which the parts in PyTorch run where they
are. A tool that is not there is named and left out. Decoding is compared in float32: the tool's own code with its scales
widened, so that it rounds at most once; and in its own type, to which ours is rounded once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_fast.recipes import encoding_named
from llama_ref.checkpoint import open_checkpoint
from llama_ref.formats.huggingface import halve, huggingface_name, is_rotary
from tests.ref.quantised_files import CONFIG, write_matrices
from tests.ref.test_quantised import RECORDED, RECORDED_MODULE

Parts = dict[str, Tensor]


class Written(NamedTuple):
    """One case: `quantise(weight)` gives (the tool's tensors, decoded in float32, decoded in the tool's own type)."""

    name: str
    tool: str
    settings: dict[str, Any]
    quantise: Callable[[Tensor, str], tuple[Parts, Tensor, Tensor]]
    headers: dict[str, str]


def range_of(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales that float16 holds, and zero points, of the last axis."""
    most = (1 << bits) - 1
    high, low = grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)
    if symmetric:
        scale = (2 * torch.maximum(high, -low) / most).half().float()
        return scale, torch.full_like(scale, (most + 1) // 2)
    scale = ((high - low) / most).half().float()
    return scale, (-(low / scale).round()).clamp(1, most)


def gptqmodel_cases() -> Iterator[Written]:
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    def made(bits: int, group: int, symmetric: bool, order: bool, version: int) -> Written:
        def quantise(weight: Tensor, name: str) -> tuple[Parts, Tensor, Tensor]:
            out, columns = weight.shape
            size = group if group > 0 else columns
            of_column = torch.arange(columns) // size
            if order:
                of_column = of_column[torch.randperm(columns)]
            grouped = torch.stack([weight[:, of_column == g] for g in range(columns // size)], 1)
            scale, zero = range_of(grouped, bits, symmetric)
            number = ((weight / scale[:, of_column]).round() + zero[:, of_column]).clamp(0, (1 << bits) - 1)
            linear = torch.nn.Linear(columns, out, bias=False)
            linear.weight.data = (number - zero[:, of_column]) * scale[:, of_column]
            module: Any = TorchLinear(bits, group, symmetric, order, columns, out)
            module.pack_original(linear, scale, zero, of_column.int())
            module.enable_wf_unsqueeze = True
            module._init_wf_unsqueeze_buffers()
            own = PackableQuantLinear.dequantize_weight(module).t().clone()
            scales, module.scales = module.scales, module.scales.float()
            wide = PackableQuantLinear.dequantize_weight(module).t().float().clone()
            module.scales = scales
            if version == 1:
                kind = type("Settings", (), {"bits": bits, "pack_dtype": torch.int32, "format": FORMAT.GPTQ})()
                convert_gptq_v2_to_v1_format_module(module, kind)
            names = ("qweight", "qzeros", "scales", "g_idx")
            return {name: getattr(module, name).detach().clone() for name in names}, wide, own

        kind = "gptq" if version == 1 else "gptq_v2"
        settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": symmetric}
        marks = "".join(("-sym" if symmetric else "", "-order" if order else "", f"-v{version}"))
        name = f"gptq-{bits}-g{group}{marks}"
        return Written(name, "gptqmodel 7.7.0", settings | {"checkpoint_format": kind}, quantise, {})

    for bits in (2, 3, 4, 8):
        yield made(bits, 32, False, False, 1)
        yield made(bits, 32, False, True, 2)
    yield made(4, 32, True, False, 1)
    yield made(8, -1, True, False, 2)


def autoawq_cases() -> Iterator[Written]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its farewell
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm

    def quantise(weight: Tensor, name: str) -> tuple[Parts, Tensor, Tensor]:
        out, columns = weight.shape
        grouped = weight.unflatten(1, (-1, 32))
        scale, zero = range_of(grouped, 4, False)
        linear = torch.nn.Linear(columns, out, bias=False)
        number = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
        linear.weight.data = ((number - zero[..., None]) * scale[..., None]).flatten(1)
        made = WQLinear_GEMM.from_linear(linear, 4, 32, False, scale.t().contiguous(), zero.t().contiguous())
        wide, own = (
            dequantize_gemm(made.qweight, made.qzeros, s, 4, 32).t() for s in (made.scales.float(), made.scales)
        )
        return {part: tensor.clone() for part, tensor in made.state_dict().items()}, wide, own

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    yield Written("awq-4-g32", "autoawq 0.2.9", settings, quantise, {})


SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "4-g32": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "4-g32-zero": ("pack-quantized", {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}),
    "3-g32-zero": ("pack-quantized", {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 32}),
    "6-row-zero": ("pack-quantized", {"num_bits": 6, "symmetric": False, "strategy": "channel"}),
    "8-g16": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 16}),
    "4-whole-zero": ("pack-quantized", {"num_bits": 4, "symmetric": False, "strategy": "tensor"}),
    "int8-row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-row-zero": ("int-quantized", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
    "fp8-row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-whole": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 48]},
    ),
}


def compressed_tensors_cases() -> Iterator[Written]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def made(name: str, form: str, fields: dict[str, Any]) -> Written:
        weights = QuantizationArgs(**fields)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
        compressor = BaseCompressor.get_value_from_registry(form)

        def grouped(weight: Tensor) -> Tensor:
            if weights.strategy == "tensor":
                return weight.reshape(1, -1)
            if weights.strategy != "block":
                return weight.unflatten(1, (-1, weights.group_size or weight.shape[1]))
            rows, columns = weights.block_structure
            padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
            return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)

        def quantise(weight: Tensor, name: str) -> tuple[Parts, Tensor, Tensor]:
            weight = weight.bfloat16()
            groups = grouped(weight.float())
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
            state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero}
            parts = compressor.compress(state, scheme)
            widened = parts | {"weight_scale": parts["weight_scale"].float()}
            wide, own = (compressor.decompress(some, scheme)["weight"] for some in (widened, parts))
            return {part: tensor.contiguous() for part, tensor in parts.items()}, wide, own

        stated = QuantizationConfig(config_groups={"group_0": scheme}, format=form, ignore=["lm_head"])
        settings = json.loads(json.dumps(stated.to_dict(), default=str))
        return Written(f"ct-{name}", "compressed-tensors 0.20.1", settings, quantise, {})

    yield from (made(name, *scheme) for name, scheme in SCHEMES.items())


def torchao_cases() -> Iterator[Written]:
    from torchao import quantization as ao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    def made(name: str, config: Any) -> Written:
        headers: dict[str, str] = {}

        def quantise(weight: Tensor, name: str) -> tuple[Parts, Tensor, Tensor]:
            model = torch.nn.ModuleDict({"x": torch.nn.Linear(*weight.shape[::-1], bias=False)}).float()
            model["x"].weight.data = weight
            ao.quantize_(model, config)
            tensors, header = flatten_tensor_state_dict(model.state_dict())
            headers[f"{name}.weight"] = header["x.weight"]
            decoded = model["x"].weight.dequantize()
            return {part.removeprefix("x."): tensor for part, tensor in tensors.items()}, decoded, decoded

        return Written(f"torchao-{name}", "torchao 0.18.0", {"quant_method": "torchao"}, quantise, headers)

    yield made("int8", ao.Int8WeightOnlyConfig())
    yield made("int8-g32", ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)))
    yield made("fp8", ao.Float8WeightOnlyConfig())
    four = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
    yield made("int4-zero", ao.IntxWeightOnlyConfig(**four, mapping_type=ao.MappingType.ASYMMETRIC))


TOOLS = (gptqmodel_cases, autoawq_cases, compressed_tensors_cases, torchao_cases)


def compare(written: Written, directory: Path) -> tuple[Parts, Tensor]:
    """Write a whole model, and compare; the tensors of the recorded module, and its matrix."""
    parts_of: dict[str, tuple[Parts, Tensor, Tensor]] = {}

    def quantise(out: int, columns: int, generator: torch.Generator, module: str) -> tuple[Parts, Tensor]:
        weight = torch.randn(out, columns, generator=generator) * 0.2
        parts_of[module] = written.quantise(weight, module)
        return parts_of[module][0], parts_of[module][1]

    write_matrices(directory, written.settings, quantise, headers=written.headers)
    checkpoint = open_checkpoint(directory)
    for stem, encoding in checkpoint.encodings.items():
        parts = {
            name[len(stem) + 1 :]: held[:] for name, held in checkpoint.weights.items() if name.startswith(f"{stem}.")
        }
        found = encoding_named(encoding).decode(parts)
        if is_rotary(f"{stem}.weight"):
            found = halve(found, CONFIG.head_dim)
        _, wide, own = parts_of[huggingface_name(f"{stem}.weight").removesuffix(".weight")]
        assert torch.equal(found, wide.float()), f"{written.name}: {stem} differs from {written.tool}'s decoding"
        assert torch.equal(found.to(own.dtype), own), f"{written.name}: {stem} differs in the tool's own type"
    assert len(checkpoint.encodings) == len(parts_of)
    return parts_of[RECORDED_MODULE][:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="rewrite the file that the tests read; needs every tool")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tensors: Parts = {}
    facts: dict[str, str] = {}
    for cases in TOOLS:
        try:
            for written in cases():
                with tempfile.TemporaryDirectory() as folder:
                    parts, matrix = compare(written, Path(folder))
                tensors |= {f"{written.name}/{part}": tensor.contiguous().clone() for part, tensor in parts.items()}
                fact = {"tool": written.tool, "settings": written.settings, "shape": list(matrix.shape)}
                fact["sha256"] = hashlib.sha256(matrix.float().contiguous().numpy().tobytes()).hexdigest()
                fact["header"] = written.headers.get(f"{RECORDED_MODULE}.weight")
                facts[written.name] = json.dumps(fact)
                print(f"{written.name}: equal to {written.tool}")
        except ImportError as error:
            print(f"{cases.__name__}: left out ({error})")
            assert not arguments.record, "recording needs every tool"
    if arguments.record:
        RECORDED.parent.mkdir(exist_ok=True)
        save_file(tensors, RECORDED, metadata=facts)


if __name__ == "__main__":
    main()
