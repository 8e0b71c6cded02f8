"""What a caller asks a text to be: a JSON value of some schema, a match of a regular expression, one of several texts, or a
word of a grammar. Each is a value; `written` spells it for llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama_ref.arguments import flag, shown, text, texts


class Grammar(Protocol):
    """A set of texts."""

    def written(self) -> str:
        """The grammar as llguidance reads it, JSON; ValueError for what is none."""


@dataclass(frozen=True)
class JsonSchema:
    """One JSON value of this schema, with nothing before or behind it; keys come in the schema's order.

    `schema`: an object, True for any value, or the text of one. `spaced`: white space may stand between its tokens.
    """

    schema: Mapping[str, Any] | bool | str
    spaced: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "spaced", flag("spaced", self.spaced))
        if not isinstance(self.schema, (Mapping, bool, str)):
            raise TypeError(f"schema={shown(self.schema)} must be a JSON schema: an object, or True")

    def document(self) -> str:
        """The schema with how it is to be read, as JSON; ValueError for what is none."""
        # what a schema's "x-guidance" says is overruled: neither may it be read leniently, nor "oneOf" as "anyOf"
        options: dict[str, Any] = {"whitespace_flexible": self.spaced, "coerce_one_of": False, "lenient": False}
        options |= {"whitespace_pattern": None, "item_separator": ",", "key_separator": ":"}
        try:
            schema = json.loads(self.schema) if isinstance(self.schema, str) else self.schema
            given = dict(schema) if isinstance(schema, Mapping) else {"allOf": [schema]}
            return json.dumps({**given, "x-guidance": options})
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"the schema is no JSON ({' '.join(str(error).split())[:100]})") from None

    def written(self) -> str:
        return f'{{"grammars": [{{"json_schema": {self.document()}}}]}}'


ANY_OBJECT = JsonSchema({"type": "object"})


@dataclass(frozen=True)
class Regex:
    """A text that matches as a whole. The syntax is that of Rust's crate `regex`: no look-around, no back-references."""

    pattern: str

    def __post_init__(self) -> None:
        text("pattern", self.pattern)

    def written(self) -> str:
        return library().LLMatcher.grammar_from_regex(self.pattern)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Choice:
    """One of these texts."""

    texts: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", texts("texts", self.texts))
        if not self.texts or not all(self.texts):
            raise ValueError("a choice needs texts, none of them empty")

    def written(self) -> str:
        return Lark("start: " + " | ".join(quoted(one) for one in self.texts)).written()


@dataclass(frozen=True)
class Lark:
    """A word of a context-free grammar, in llguidance's dialect of Lark; its rule `start` is the whole."""

    rules: str

    def __post_init__(self) -> None:
        text("rules", self.rules)

    def written(self) -> str:
        return json.dumps({"grammars": [{"lark_grammar": self.rules}]})


def quoted(text: str) -> str:
    """A text as Lark spells it: 'say "a"' -> '"say \\"a\\""'."""
    return json.dumps(text, ensure_ascii=False)


def library() -> Any:
    """The package llguidance; ValueError, in one line, where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise ValueError("grammars need the package llguidance: pip install 'llama-fast[grammar]'") from None
    return llguidance
