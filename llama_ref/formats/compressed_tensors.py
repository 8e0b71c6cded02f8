"""compressed-tensors: integers packed in words ("pack-quantized") or plain ("int-quantized"), and e4m3 ("float-quantized").

Which scheme a module has is told by `config_groups`: targets are names, patterns "re:...", or the class "Linear", in this order;
of several patterns that match, the tool takes the alphabetically first, and so do we. A file may mix schemes.

| format | tensors | notes |
|---|---|---|
| `pack-quantized` | `weight_packed` int32 [out, words], `weight_shape` | plus half their range; zero points along the output |
| `int-quantized`, `naive-quantized`, `float-quantized` | `weight` int8 or e4m3 | zero points as they are |

Besides, all have `weight_scale`, and `weight_zero_point` unless symmetric. Of 3, 5 and 6 bits there are two layouts under the one
name, told apart by the number of words: a stream of bits, and, in files written before it, words with as many whole numbers as
fit. Early releases (0.8) did not pack zero points. `weight_g_idx` is GPTQ's, and was written until it was removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_ref.formats.fields import flag, whole, word
from llama_ref.formats.fp8_files import OF_ACTIVATIONS, OF_CACHE, block_of
from llama_ref.formats.narrow import E4M3, Narrow, Rows, matrix_rows, table_rows, vector_rows
from llama_ref.formats.packed_bits import padded_words, signed, stream_words, unpacked_padded, unpacked_stream
from llama_ref.formats.quantised import Quantised, matches, refused
from llama_ref.weights import CheckpointError, TensorSource

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "naive-quantized", "float-quantized")
MIXED = ("mixed-precision", "dense")  # each group says its own
CLASS = "Linear"
INTEGERS = (torch.int8, torch.int32, torch.int64)
OF_ROUNDING = ("input_zero_point", "output_zero_point", "input_global_scale")


def read(quantised: Quantised) -> dict[str, Narrow]:
    """The matrices that are stored in parts; CheckpointError, or ValueError for a setting that is not supported."""
    settings = quantised.settings
    kind = word(settings, "format", PACKED)
    if kind not in (PACKED, *PLAIN, *MIXED):
        raise refused("format", kind)
    for name in ("transform_config", "sparsity_config"):
        stated = settings.get(name)
        if stated and not (isinstance(stated, dict) and word(stated, "format", "") == "dense"):
            raise refused(name, stated)
    groups, ignored = _groups(settings), _texts(settings.get("ignore"), "ignore")
    found = {}
    for module in [*quantised.modules_with("weight_packed"), *quantised.modules_with("weight_scale")]:
        scheme = None if any(matches(module, name) for name in ignored) else _scheme_of(module, groups)
        if scheme is None:
            raise CheckpointError(f"{quantised.directory}: {module} is stored in parts, and no config group names it")
        if module not in found:
            found[module] = _matrix(quantised, module, scheme, kind)
    _said_once(quantised, groups)
    return found


def _said_once(quantised: Quantised, groups: list[Mapping[str, Any]]) -> None:
    """Take what is no weight's: scales of activations, and of keys and values."""
    of_cache = []
    for module in {name.rpartition(".")[0] for name in quantised.stored}:
        quantised.drop(module, *OF_ACTIVATIONS, *OF_ROUNDING)
        of_cache += quantised.drop(module, *OF_CACHE, "q_scale", "k_zero_point", "v_zero_point")
    named = [name for name in ("input_activations", "output_activations") if any(group.get(name) for group in groups)]
    told = [*named, *(["kv_cache_scheme"] if of_cache or quantised.settings.get("kv_cache_scheme") else [])]
    if told:
        quantised.weights_only(", ".join(told))


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"config_groups={groups!r:.80} must name groups")
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ValueError(f"config_groups: {name!r:.80} states no weights: {group!r:.80} is not supported")
        _texts(group.get("targets"), "targets")
    return list(groups.values())


def _texts(stated: Any, name: str) -> list[str]:
    if stated is None:
        return []
    if not isinstance(stated, list) or not all(isinstance(text, str) for text in stated):
        raise ValueError(f"{name}={stated!r:.80} must be a list of texts")
    return stated


def _scheme_of(module: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """By the target that is the module's name, else the alphabetically first pattern that matches it, else its class."""
    scheme_of = {target: group for group in groups for target in _texts(group.get("targets"), "targets")}
    named = [
        target for target in sorted(scheme_of, key=lambda text: (text[:3] == "re:", text)) if matches(module, target)
    ]
    return scheme_of.get(named[0] if named else CLASS)


def _matrix(quantised: Quantised, module: str, scheme: Mapping[str, Any], kind: str) -> Narrow:
    weights = scheme["weights"]
    kind = word(scheme, "format", kind)
    bits, type_ = whole(weights, "num_bits", 8), word(weights, "type", "int")
    if kind not in (PACKED, *PLAIN):
        raise refused("format", kind)
    if type_ not in ("int", "float") or bits > 8 or (type_ == "float" and (bits != 8 or kind == PACKED)):
        raise ValueError(f"weights of num_bits={bits}, type={type_!r:.80} as {kind} are not supported")
    shape = quantised.shapes[module]
    zeros = None if flag(weights, "symmetric", True) else f"{module}.weight_zero_point"
    if type_ == "float" and zeros is not None:
        raise refused("symmetric", False)
    rows, groups, tables = _tables(weights, shape)
    numbers = _packed(quantised, module, bits) if kind == PACKED else _plain(quantised, module, type_)
    scale = quantised.scales(module, "weight_scale", tables)
    zero = None
    if zeros is not None:
        in_words = quantised.stored[zeros].dtype is torch.int32 if zeros in quantised.stored else True
        packed = kind == PACKED and in_words and len(tables[0]) == 2  # of a whole tensor the one number is not packed
        zero = _packed_zeros(quantised, module, bits, scale) if packed else _zeros(quantised, module, tables)
    else:
        quantised.drop(module, "weight_zero_point")
    of_column: int | Tensor = groups
    if f"{module}.weight_g_idx" in quantised.stored:
        of_column = _order(quantised, module, tuple(scale.shape)[-1], groups)
    return Narrow(
        shape, bits, numbers, _rows(scale, shape[0], rows), scale.dtype, of_column, zero, floating=type_ == "float"
    )


def _tables(weights: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int, list[tuple[int, ...]]]:
    """(rows that share a scale, columns that do, shapes that a table of scales may have)."""
    out, columns = shape
    size = weights.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = word(weights, "strategy", default)
    if strategy == "tensor":
        return out, columns, [(1,), (), (1, 1)]
    if strategy == "channel":
        return 1, columns, [(out, 1), (out,)]
    if strategy == "group":
        size = whole(weights, "group_size")
        return 1, size, [(out, -(-columns // size))]
    if strategy == "block":
        block = block_of(weights.get("block_structure"), "block_structure")
        if block is None:
            raise ValueError("block_structure is missing")
        return block[0], block[1], [(-(-out // block[0]), -(-columns // block[1]))]
    raise refused("strategy", strategy)


def _rows(table: TensorSource, out: int, block_rows: int) -> Rows:
    if tuple(table.shape) == (out,) != (1,):
        return vector_rows(table)
    return table_rows(table, out, block_rows)


def _packed(quantised: Quantised, module: str, bits: int) -> Rows:
    """Numbers of words along the input, int8 [rows, in]."""
    out, columns = shape = quantised.shapes[module]
    stated = quantised.take(module, "weight_shape", (2,), (torch.int64, torch.int32))[:].tolist()
    if stated != list(shape):
        raise CheckpointError(f"{quantised.directory}: {module}.weight_shape is {stated}, not {list(shape)}")
    words = quantised.shape_of(module, "weight_packed", 2)[1]
    older = words == padded_words(columns, bits) != stream_words(columns, bits)
    count, unpacked = (padded_words, unpacked_padded) if older else (stream_words, unpacked_stream)
    source = quantised.take(module, "weight_packed", (out, count(columns, bits)), (torch.int32,))
    return lambda start, stop: signed(unpacked(source[start:stop], bits, columns), 1 << (bits - 1))


def _plain(quantised: Quantised, module: str, type_: str) -> Rows:
    kind = E4M3 if type_ == "float" else torch.int8
    return matrix_rows(quantised.take(module, "weight", quantised.shapes[module], (kind,)))


def _packed_zeros(quantised: Quantised, module: str, bits: int, scale: TensorSource) -> Rows:
    """Zero points of words along the output, int8 [rows, groups]; `scale` has a row for each."""
    out = quantised.shapes[module][0]
    groups = tuple(scale.shape)[1] if len(scale.shape) == 2 else 1
    words = quantised.shape_of(module, "weight_zero_point", 2)[0]
    older = words == padded_words(out, bits) != stream_words(out, bits)
    count, unpacked = (padded_words, unpacked_padded) if older else (stream_words, unpacked_stream)
    source = quantised.take(module, "weight_zero_point", (count(out, bits), groups), (torch.int32,))
    block = 32 // bits if older else 32  # rows that fill whole words

    def read(start: int, stop: int) -> Tensor:
        first, last = start // block * block, min(-(-stop // block) * block, out)
        rows = unpacked(source[count(first, bits) : count(last, bits)].t(), bits, last - first)
        return signed(rows, 1 << (bits - 1))[:, start - first : stop - first].t().contiguous()

    return read


def _zeros(quantised: Quantised, module: str, tables: list[tuple[int, ...]]) -> Rows:
    """Zero points as they are; tables of blocks are not written with any."""
    name = f"{module}.weight_zero_point"
    shape = tuple(quantised.stored[name].shape) if name in quantised.stored else ()
    source = quantised.take(module, "weight_zero_point", shape if shape in tables else tables[0], INTEGERS)
    read = _rows(source, quantised.shapes[module][0], 1)

    def checked(start: int, stop: int) -> Tensor:
        zero = read(start, stop)
        if bool((zero != zero.to(torch.int8)).any()):
            raise CheckpointError(f"{quantised.directory}: {name} holds a number that is none of 8 bits")
        return zero.to(torch.int8)

    return checked


def _order(quantised: Quantised, module: str, groups: int, size: int) -> int | Tensor:
    columns = quantised.shapes[module][1]
    of_column = quantised.take(module, "weight_g_idx", (columns,), (torch.int32, torch.int64))[:].long()
    if bool((of_column == -1).all()):  # made, and never filled in: columns stand as they are
        return size
    if bool(((of_column < 0) | (of_column >= groups)).any()):
        raise CheckpointError(f"{quantised.directory}: {module}.weight_g_idx names a group that is none of {groups}")
    return of_column
