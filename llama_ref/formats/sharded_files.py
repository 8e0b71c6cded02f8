"""Weights in several files, and the index that says which file holds which tensor."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from llama_ref.formats.safetensors_files import read_json
from llama_ref.weights import CheckpointError, TensorSource


def open_shards(
    directory: Path, index: str, open_file: Callable[[Path], Mapping[str, TensorSource]]
) -> dict[str, TensorSource]:
    """The tensors of all shards that an index names, each shard opened by `open_file`; CheckpointError.

    A tensor that stands in several shards, as where one was left from an earlier save, is the one of the index.
    """
    place_of = places(directory / index)
    shards = sorted(set(place_of.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(f"{directory}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:20])}")
    opened = {shard: open_file(directory / shard) for shard in shards}
    strays = [f"{name} (by the index in {shard})" for name, shard in place_of.items() if name not in opened[shard]]
    if strays:
        raise CheckpointError(f"{directory}: {len(strays)} missing: {', '.join(strays[:20])}")
    counts = Counter(name for shard in opened.values() for name in shard)
    doubles = [name for name, count in counts.items() if count > 1]
    unplaced = [name for name in doubles if name not in place_of]
    if unplaced:
        raise CheckpointError(f"{directory}: {unplaced[0]} stands in several shards, and {index} names none of them")
    if doubles:
        told = (
            f"{doubles[0]!r:.200} and {len(doubles) - 1} more stand" if doubles[1:] else f"{doubles[0]!r:.200} stands"
        )
        warnings.warn(f"{directory}: {told} in several shards; read where {index} says", stacklevel=3)
    return {
        name: tensor
        for shard, tensors in opened.items()
        for name, tensor in tensors.items()
        if place_of.get(name, shard) == shard
    }


def places(index: Path) -> dict[str, str]:
    """Tensor name -> file name, all of them files of the index's own directory."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of file names")
    if not places:
        raise CheckpointError(f"{index}: its weight_map names no tensor")
    outside = [shard for shard in places.values() if not shard or Path(shard).name != shard or "\0" in shard]
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r}, which is no file of this directory")
    return places
