"""What stands beside a vocabulary: which tokens exist besides its own, and which of them are special.

Four files say so, and transformers 5 is the judge of which one counts (`PreTrainedTokenizerBase._from_pretrained` and
`TokenizersBackend.__init__`). Where tokenizer_config.json has an `added_tokens_decoder`, it is the whole list, and
special_tokens_map.json and added_tokens.json are not read. Otherwise these two count, over tokenizer_config.json, and
so do the `added_tokens` of tokenizer.json. A token that a name such as `eos_token` stands for is always special.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from llama_ref.tokenizers.added_tokens import AddedToken, token_as_stated
from llama_ref.tokenizers.tokenizer_files import (
    ADDED_FILE,
    MAP_FILE,
    SETTINGS_FILE,
    TokenizerError,
    beside,
    read_json_object,
)

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
NOT_FOLLOWED = {
    "fix_mistral_regex": "the expression that cuts words stays that of tokenizer.json",
    "fast_tokenizer_files": "tokenizer.json is read",
    "add_eos_token": "a text is encoded to be continued, so no EOS is put behind it",
}
"""Settings of tokenizer_config.json that would change ids, and what is done instead."""


@dataclass(frozen=True)
class Companions:
    """`named` are special tokens by name, `extra` those without one, `listed` all that the files list by id."""

    settings: Mapping[str, Any]
    named: Mapping[str, AddedToken]
    extra: tuple[AddedToken, ...]
    listed: Mapping[int, AddedToken]

    def tokens(self, known: Collection[str] = ()) -> list[AddedToken]:
        """All tokens in the order in which new ones get ids. What is `known` already need not be added for its name."""
        named = {token.content for token in self.named.values()}
        tokens = [self.listed[index] for index in sorted(self.listed)]
        seen = {*known, *(token.content for token in tokens)}
        for token in (*self.named.values(), *self.extra):
            if token.content not in seen and token not in tokens:
                tokens.append(token)
        return [dataclasses.replace(token, special=token.special or token.content in named) for token in tokens]


def read_companions(
    files: Mapping[str, str],
    where: object,
    of_json: Mapping[int, AddedToken] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> Companions:
    """From the text of the files, by name. `of_json` are the added tokens of tokenizer.json, by id, and `defaults` the
    special tokens, by name, where no file states or denies them. Raises TokenizerError."""
    settings_file, map_file, added_file = (beside(where, name) for name in (SETTINGS_FILE, MAP_FILE, ADDED_FILE))
    settings = read_json_object(files.get(SETTINGS_FILE, "{}"), settings_file)
    _say_what_is_not_followed(settings, where)
    stated = dict(settings)
    if OLD_EXTRA in stated and not stated.get(EXTRA):
        stated[EXTRA] = stated.pop(OLD_EXTRA)
    own_names = _pop_own_names(stated)
    listed: dict[int, AddedToken] = {}
    if settings.get("added_tokens_decoder") is not None:
        listed = _decoder(settings["added_tokens_decoder"], settings_file)
    else:
        _apply_map(stated, read_json_object(files.get(MAP_FILE, "{}"), map_file), map_file)
        if isinstance(stated.get(EXTRA), dict):
            own_names |= stated.pop(EXTRA)
        _refuse_unlisted(stated, settings_file)
        added = read_json_object(files.get(ADDED_FILE, "{}"), added_file)
        listed = _added(added, stated, added_file) | dict(of_json or {})
    _refuse_unlisted(stated, settings_file)
    defaults = defaults or {}
    late_names = {name: stated[name] for name in stated if _is_own_name(name) and token_as_stated(stated[name])}
    spelled = {name: stated.get(name, defaults.get(name)) for name in dict.fromkeys((*NAMES, *defaults))}
    named = {
        name: token
        for name, value in (spelled | late_names | own_names).items()
        if value is not None and (token := _token(value, name, settings_file)).content
    }
    extra = [_token(value, EXTRA, settings_file) for value in stated.get(EXTRA, stated.get(OLD_EXTRA)) or ()]
    return Companions(settings, named, tuple(token for token in extra if token.content), listed)


def _say_what_is_not_followed(settings: Mapping[str, Any], where: object) -> None:
    for name, instead in NOT_FOLLOWED.items():
        if settings.get(name):
            warnings.warn(f"{beside(where, SETTINGS_FILE)}: {name} is not followed: {instead}", stacklevel=2)


def _is_own_name(name: str) -> bool:
    """Whether a setting may be a special token by a name of this model's own, as "image_token"."""
    return name.endswith("_token") and name not in NAMES


def _pop_own_names(stated: dict[str, Any]) -> dict[str, Any]:
    """Take the special tokens with names of the model's own out of the settings: {"image_token": "<image>"}. Only those
    that stand there as text, and those of an object of unnamed tokens, come before special_tokens_map.json's."""
    own = {name: stated.pop(name) for name in list(stated) if _is_own_name(name) and isinstance(stated[name], str)}
    if isinstance(stated.get(EXTRA), dict):
        own |= stated.pop(EXTRA)
    return own


def _apply_map(stated: dict[str, Any], mapped: Mapping[str, Any], where: object) -> None:
    """Put what special_tokens_map.json says over the settings; its unnamed tokens come behind theirs."""
    for name, value in mapped.items():
        if name in NAMES and value is not None:
            _token(value, name, where)
        if isinstance(value, dict) and name != EXTRA:
            value = {key: entry for key, entry in value.items() if key != "special"} | {"special": True}
        if name in (EXTRA, OLD_EXTRA) and isinstance(value, list):
            value = [{"special": True} | token if isinstance(token, dict) else token for token in value]
        if name == EXTRA and isinstance(value, list):
            before = list(stated.get(EXTRA) or [])
            value = [*before, *(token for token in value if token not in before)]
        stated[name] = value


def _refuse_unlisted(stated: Mapping[str, Any], where: object) -> None:
    for name in (EXTRA, OLD_EXTRA):
        if not isinstance(stated.get(name), (list, type(None))):
            raise TokenizerError(f"{where}: {name}={stated[name]!r:.80} is not a list or an object of tokens")


def _decoder(entries: Any, where: object) -> dict[int, AddedToken]:
    """tokenizer_config.json's {"128000": {"content": "<|begin_of_text|>", ...}}."""
    if not isinstance(entries, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder is no object")
    found = {}
    for index, entry in entries.items():
        token = token_as_stated(entry) if isinstance(entry, dict) else None
        if token is None or not token.content or not index.isascii() or not index.isdecimal():
            raise TokenizerError(f"{where}: added_tokens_decoder holds {index!r}, which is no token")
        found[_id(int(index), token.content, where)] = token
    return found


def _added(entries: Mapping[str, Any], stated: Mapping[str, Any], where: object) -> dict[int, AddedToken]:
    """added_tokens.json's {"<|im_start|>": 32000}: special if the settings use the token."""
    used = [*(stated.get(name) for name in NAMES), *(stated.get(EXTRA) or ())]
    plain = [entry for entry in used if not (isinstance(entry, dict) and "__type" in entry)]  # transformers' own form
    special = {token.content for token in map(token_as_stated, plain) if token}
    return {
        _id(index, content, where): AddedToken(content, special=content in special, normalized=content not in special)
        for content, index in entries.items()
    }


def _id(index: Any, content: str, where: object) -> int:
    if not content or isinstance(index, bool) or not isinstance(index, int):
        raise TokenizerError(f"{where}: an added token must have text and an id, not {content!r} and {index!r}")
    if not 0 <= index < 1 << 31:
        raise TokenizerError(f"{where}: the added token {content!r} has the id {index}")
    return index


def _token(stated: Any, name: str, where: object) -> AddedToken:
    token = token_as_stated(stated)
    if token is None:
        raise TokenizerError(f"{where}: {name}={stated!r:.80} is neither text nor an object with text as its content")
    return token
