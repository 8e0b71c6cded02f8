"""The harness's words in ours: what a task says of a generation, and what `--model_args` say of a model.

What changes nothing here is accepted, what would change an answer is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

LOG = logging.getLogger(__name__)

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting; of several the first counts."""

FILTERS = ("top_k", "top_p", "min_p")

ANY = object()

# names of transformers' and vLLM's generation settings, and the values with which they change nothing
NEUTRAL_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "n": (1,),
    "best_of": (1,),
    "early_stopping": (ANY,),  # of beams, as the next two
    "length_penalty": (ANY,),
    "diversity_penalty": (ANY,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "use_cache": (ANY,),
    "pad_token_id": (ANY,),
}
# transformers drops these where nothing is drawn
ONLY_OF_SAMPLING = (*FILTERS, "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")

# arguments of the harness's `hf` model, and the values with which they change no answer
NEUTRAL_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "backend": ("default", "causal"),
    "revision": ("main",),
    "subfolder": ("",),
    "truncation": (False,),
    "parallelize": (False,),
    "autogptq": (False,),
    "gptqmodel": (False,),
    "load_in_8bit": (False,),
    "load_in_4bit": (False,),
    "softmax_dtype": ("float32",),
    "logits_cache": (ANY,),
    "trust_remote_code": (ANY,),  # no code of a checkpoint's is ever run
    "use_fast_tokenizer": (ANY,),
    "low_cpu_mem_usage": (ANY,),
    "attn_implementation": (ANY,),
    "device_map": ("auto",),
    "max_memory_per_gpu": (ANY,),  # these three are of parallelize=True
    "max_cpu_memory": (ANY,),
    "offload_folder": (ANY,),
}


def changes_nothing(name: str, value: Any, neutral: Mapping[str, tuple[Any, ...]]) -> bool:
    """Whether a setting has a value that leaves every answer as it is: ("num_beams", 1, NEUTRAL_SETTINGS) -> True."""
    return value is None or any(value == one or one is ANY for one in neutral.get(name, ()))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """ValueError for a model argument that is neither ours nor one that changes nothing."""
    for name, value in arguments.items():
        if not changes_nothing(name, value, NEUTRAL_ARGUMENTS):
            raise ValueError(f"model argument {name}={value!r} is not supported")


def generation_options(settings: Mapping[str, Any], most: int) -> tuple[dict[str, Any], int]:
    """The harness's words in ours, and the number of new tokens; ValueError for a word that would change the answer.

    {"until": ["\\n"], "do_sample": False, "temperature": 0.7} -> {"stop": ["\\n"], "temperature": 0.0}, most
    """
    left = {name: value for name, value in settings.items() if value is not None}
    options: dict[str, Any] = {"stop": stop_strings(left.pop("until", ()))}
    limits = {name: left.pop(name) for name in TOKEN_LIMITS if name in left}
    if len(limits) > 1:
        LOG.warning("several limits of new tokens: %s; the first counts", limits)
    name, limit = next(iter(limits.items()), (TOKEN_LIMITS[0], most))
    tokens = number(name, limit, int)
    temperature = number("temperature", left.pop("temperature", 1 if left.get("do_sample") else 0), float)
    sampled = left.pop("do_sample", temperature > 0)
    options["temperature"] = temperature if sampled else 0.0
    if not sampled:
        left = {name: value for name, value in left.items() if name not in ONLY_OF_SAMPLING}
    for name, kind in (
        ("top_k", int),
        ("top_p", float),
        ("min_p", float),
        ("repetition_penalty", float),
        ("seed", int),
    ):
        if name in left:
            options[name] = number(name, left.pop(name), kind)
    if options.get("top_k") in (0, -1):  # transformers' and vLLM's words for all
        del options["top_k"]
    for name, value in sorted(left.items()):
        if not changes_nothing(name, value, NEUTRAL_SETTINGS):
            raise ValueError(f"generation setting {name!r} is not supported with the value {value!r}")
    return options, tokens


def stop_strings(until: Any) -> list[str]:
    """ "x" -> ["x"], ["", "x"] -> ["x"], None -> []."""
    words = [until] if isinstance(until, str) else until
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"until={until!r:.80}: a stop string is text, and several are a list")
    return [word for word in words if word]


def number(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    """The value as a number of this kind; ValueError if it is none."""
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation setting {name}={value!r}: not a number") from error


def without_stops(text: str, stop: list[str], think_end: str | None = None) -> str:
    """Text before all stop strings, one after the other, and behind the end of thinking, as the harness cuts it."""
    if think_end:
        text = text.split(think_end)[-1].lstrip()
    for word in stop:
        text = text.split(word)[0]
    return text
