"""adapter_config.json of a PEFT directory: which modules a LoRA changes, and by how much. As peft 0.21 reads it.

Modules have Hugging Face's names, as "model.layers.3.self_attn.q_proj". What would make another arithmetic of the file (a changed
base, replicated layers, BD-LoRA) is refused by the name of its field.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_ref.formats.fields import flag, number, whole

EVERY_LINEAR = "all-linear"
LLAMAS = ("q_proj", "v_proj")  # what peft targets in a Llama or Mistral where target_modules is null
HEAD = "lm_head"
BIASES = ("none", "all", "lora_only")
SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""The values of init_lora_weights that leave the base model as it is."""

UNSUPPORTED = (
    "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
"""Fields that, unless null, false or empty, ask for more than a product of two matrices beside a third."""

OF_TRAINING = (
    *("auto_mapping", "peft_version", "revision", "task_type", "inference_mode", "lora_dropout", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config"),
)
"""Fields that change nothing when the adapter is used."""

READ = (
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_bias", "use_dora", "fan_in_fan_out", "init_lora_weights", "ensure_weight_tying"),
)


@dataclass(frozen=True)
class LoraConfig:
    """Which modules have a pair of matrices, of which rank and scale; which are stored whole; which biases are.

    `targets` and `excluded` are names, or one regular expression.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    bias: str
    lora_bias: bool
    dora: bool
    ties_tables: bool
    base_model: str

    def has_pair(self, module: str) -> bool:
        """Whether a linear module, or the embedding, is targeted."""
        if _named(self.excluded, module):
            return False
        if any(_matches(rf"(^|.*\.){name}($|\..*)", module, "modules_to_save") for name in self.saved):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == EVERY_LINEAR:
                return module != HEAD and not module.endswith("embed_tokens")
            return _named(self.targets, module)
        if module in self.targets:
            return True
        return _named(self.targets, module) and (not self.layers or self._layer(module) in self.layers)

    def is_saved(self, module: str) -> bool:
        """Whether the module, or one that it is a part of, is stored whole. As in peft, "norm" names every "...norm"."""
        parts = module.split(".")
        above = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return any(name.endswith(saved) for name in above for saved in self.saved)

    def rank(self, module: str) -> int:
        """The rank of the module's pair."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module, "rank_pattern"), self.r)

    def scale(self, module: str) -> float:
        """What the product of the pair is multiplied by: alpha / r, or alpha / sqrt(r)."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module, "alpha_pattern"), self.alpha)
        return alpha / (math.sqrt(self.rank(module)) if self.rslora else self.rank(module))

    def _layer(self, module: str) -> int | None:
        """The number behind the first name of a list of layers: 3 in "model.layers.3.self_attn.q_proj"."""
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = _matches(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module, "layers_pattern")
            if found is not None:
                return int(found.group("index"))
        return None


def lora_config(data: Mapping[str, Any], where: object) -> LoraConfig:
    """From the content of an adapter_config.json. ValueError names the field; a warning says what is not read."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type={kind!r:.80} is not supported (known: LORA)")
    for name in UNSUPPORTED:
        if data.get(name):
            raise ValueError(f"{name}={data[name]!r:.80} is not supported")
    _check_base(data.get("init_lora_weights"))
    if flag(data, "fan_in_fan_out"):
        warnings.warn(f"{where}: fan_in_fan_out is true, but no matrix of a Llama is stored so: ignored", stacklevel=3)
    unread = [name for name, value in data.items() if value and name not in READ + OF_TRAINING + UNSUPPORTED]
    if unread:
        told = " ".join(", ".join(unread).split())
        warnings.warn(f"{where}: {told:.200} is not read", stacklevel=3)
    bias = data.get("bias", "none")
    if bias not in BIASES:
        raise ValueError(f"bias={bias!r:.80} is not supported (known: {', '.join(BIASES)})")
    targets = _modules(data, "target_modules") if data.get("target_modules") is not None else LLAMAS
    layers = _layers(data)
    if layers and isinstance(targets, str):
        raise ValueError("layers_to_transform is for target_modules in a list, not for a regular expression")
    base = data.get("base_model_name_or_path")
    return LoraConfig(
        r=whole(data, "r", 8),
        alpha=number(data, "lora_alpha", 8),
        rank_pattern={name: whole(_pairs(data, "rank_pattern"), name) for name in _pairs(data, "rank_pattern")},
        alpha_pattern={name: number(_pairs(data, "alpha_pattern"), name) for name in _pairs(data, "alpha_pattern")},
        rslora=flag(data, "use_rslora"),
        targets=targets,
        excluded=_modules(data, "exclude_modules"),
        layers=layers,
        layers_pattern=_texts(data, "layers_pattern"),
        saved=_texts(data, "modules_to_save"),
        bias=bias,
        lora_bias=flag(data, "lora_bias"),
        dora=flag(data, "use_dora"),
        ties_tables=flag(data, "ensure_weight_tying"),
        base_model=base if isinstance(base, str) else "",
    )


def _check_base(init: Any) -> None:
    known = init.lower() if isinstance(init, str) else init
    if not (known is None or isinstance(known, (bool, str))) or known not in SAME_BASE:
        raise ValueError(
            f"init_lora_weights={init!r:.80} changes the base model: convert the adapter with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _pattern(patterns: Mapping[str, Any], module: str, field: str) -> str:
    """The first pattern that is the end of a module's name; "" where none is."""
    return next((key for key in patterns if _matches(rf"(.*\.)?({key})$", module, field)), "")


def _named(names: str | Sequence[str], module: str) -> bool:
    """Whether a regular expression is the module's whole name, or one of several names its end."""
    if isinstance(names, str):
        return bool(names) and _matches(rf"(?:{names})\Z", module, "target_modules or exclude_modules") is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _matches(pattern: str, module: str, field: str) -> re.Match[str] | None:
    try:
        return re.match(pattern, module)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field} holds {pattern!r:.80}, which is no regular expression ({error})") from error


def _modules(data: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = data.get(name)
    return value if isinstance(value, str) else _texts(data, name)


def _texts(data: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Names, or one name: "layers" -> ("layers",); null -> ()."""
    value = data.get(name)
    if isinstance(value, str):
        return (value,) if value else ()
    if value is not None and not (isinstance(value, list) and all(isinstance(one, str) and one for one in value)):
        raise ValueError(f"{name}={value!r:.80} must be a list of names")
    return tuple(value or ())


def _layers(data: Mapping[str, Any]) -> tuple[int, ...]:
    value = data.get("layers_to_transform")
    layers = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"layers_to_transform={value!r:.80} must be the number of a layer, or a list of them")
    return tuple(layers)


def _pairs(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r:.80} must be an object")
    return value or {}
