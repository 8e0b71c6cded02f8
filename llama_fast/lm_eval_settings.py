"""The harness's words in ours: what a task says of a generation, and what `--model_args` say of a model.

What changes nothing here is accepted, what would change an answer is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_ref.convert import GENERATION_FILE
from llama_ref.tokenizers.tokenizer_files import read_json_object, read_text

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
    "guidance_scale": (1,),
    "pad_token_id": (ANY,),
}
# transformers drops these where nothing is drawn
ONLY_OF_SAMPLING = (*FILTERS, "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")

DEFAULTS: Mapping[str, Any] = {"top_k": 50}
"""What transformers does where neither a request nor generation_config.json says anything."""

# what the `hf` class takes from generation_config.json where a request does not say it; of the harness itself, or of
# the files' ids, are the rest
OF_CHECKPOINT = {
    *FILTERS,
    *ONLY_OF_SAMPLING,
    *NEUTRAL_SETTINGS,
    "repetition_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "stop_strings",
    "watermarking_config",
} - {"pad_token_id"}

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


def checkpoint_settings(directory: Path | None) -> dict[str, Any]:
    """What a checkpoint's generation_config.json says of all generations, beside the ids that end them.

    {"repetition_penalty": 1.1, "temperature": 0.6, "eos_token_id": 2} -> {"top_k": 50, "repetition_penalty": 1.1}: the
    harness says itself whether tokens are drawn, and how warm.
    """
    file = None if directory is None else directory / GENERATION_FILE
    if file is None or not file.is_file():
        return dict(DEFAULTS)
    stated = read_json_object(read_text(file), file)
    if stated.get("max_new_tokens") is not None:
        LOG.warning("%s: max_new_tokens=%s is ignored, max_gen_toks rules", file, stated["max_new_tokens"])
    kept = {name: value for name, value in stated.items() if name in OF_CHECKPOINT and value is not None}
    return {**DEFAULTS, **kept}


def with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A request's settings, and what stands for those that it leaves out: ({"top_k": None}, {"top_k": 50}) -> {"top_k": 50}."""
    return {**defaults, **{name: value for name, value in settings.items() if value is not None}}


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
    if tokens < 1:
        raise ValueError(f"generation setting {name}={tokens} must be at least 1")
    sampled = left.pop("do_sample", None)
    if sampled not in (None, True, False):
        raise ValueError(f"generation setting do_sample={sampled!r} must be True or False")
    temperature = number("temperature", left.pop("temperature", 1 if sampled else 0), float)
    if sampled and temperature == 0:
        LOG.warning("do_sample=True with temperature=0: the likeliest token is taken, nothing is drawn")
    sampled = temperature > 0 if sampled is None else sampled
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
            raise ValueError(
                f"generation setting {name!r} is not supported with the value {value!r} (of a task, --gen_kwargs, or "
                f"the checkpoint's {GENERATION_FILE})"
            )
    return options, tokens


def stop_strings(until: Any) -> list[str]:
    """ "x" -> ["x"], ["", "x"] -> ["x"], None -> []."""
    words = [until] if isinstance(until, str) else until
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"until={until!r:.80}: a stop string is text, and several are a list")
    return [word for word in words if word]


def has_empty_stop(settings: Mapping[str, Any]) -> bool:
    """Whether one of the stop strings is empty, which the `hf` class finds in every text."""
    until = settings.get("until")
    return until == "" or (isinstance(until, (list, tuple)) and "" in until)


def number(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    """The value as a number of this kind; ValueError if it is none."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"generation setting {name}={value!r}: not a number") from error


def without_stops(text: str, stop: list[str], think_end: str | None = None) -> str:
    """Text before all stop strings, one after the other, and behind the end of thinking, as the harness cuts it."""
    if think_end:
        text = text.split(think_end)[-1].lstrip()
    for word in stop:
        text = text.split(word)[0]
    return text
