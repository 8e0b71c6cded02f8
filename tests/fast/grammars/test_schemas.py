"""Random schemas and random walks through their grammars: whatever is complete is valid JSON of the schema.

The judge is the package jsonschema, which knows nothing of llguidance.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_fast.grammars import JsonSchema
from llama_fast.grammars.guided import Constrained, Tokens
from tests.fast.grammars.test_grammars import EOS, OTHER_EOS, Bytes

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=3)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | TEXTS, lambda inner: st.lists(inner, max_size=2), max_leaves=3
)


def bounded(least: int, most: int, low: str, high: str) -> st.SearchStrategy[dict[str, Any]]:
    """{low: a, high: b} with a <= b, either of them perhaps missing."""

    def made(pair: tuple[int, int], kept: tuple[bool, bool]) -> dict[str, Any]:
        return {name: value for name, value, keep in zip((low, high), sorted(pair), kept, strict=True) if keep}

    number = st.integers(least, most)
    return st.builds(made, st.tuples(number, number), st.tuples(st.booleans(), st.booleans()))


LEAVES = st.one_of(
    st.builds(lambda more: {"type": "string", **more}, bounded(0, 5, "minLength", "maxLength")),
    st.builds(lambda more: {"type": "integer", **more}, bounded(-30, 200, "minimum", "maximum")),
    st.builds(
        lambda more: {"type": "number", **more},
        bounded(-3, 9, "minimum", "exclusiveMaximum").filter(lambda b: len(b) < 2),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=3)),
    st.builds(lambda value: {"const": value}, VALUES),
    st.sampled_from([{"type": "boolean"}, {"type": ["null", "integer"]}, {"$ref": "#/$defs/leaf"}]),
    st.sampled_from([{"type": "string", "pattern": "^[a-cé]{2,4}$"}, {"type": "string", "format": "date"}]),
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def an_object(properties: dict[str, Any], required: list[bool], open_ended: bool) -> dict[str, Any]:
        names = [name for name, keep in zip(properties, required) if keep]
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": open_ended}

    return st.one_of(
        st.builds(
            an_object, st.dictionaries(TEXTS, inner, max_size=3), st.lists(st.booleans(), max_size=3), st.booleans()
        ),
        st.builds(
            lambda items, more: {"type": "array", "items": items, **more}, inner, bounded(0, 3, "minItems", "maxItems")
        ),
        st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=2)),
    )


SCHEMAS = st.recursive(LEAVES, nested, max_leaves=5)
DEFINITIONS = {"$defs": {"leaf": {"type": "array", "items": {"type": "integer", "minimum": 7}, "maxItems": 1}}}
TOKENS = Tokens(Bytes(), 272, (EOS, OTHER_EOS))


def walked(constraint: Constrained, draw: random.Random, most: int = 160) -> bytes | None:
    """The text of a random walk that came to an end; None for one that did not, or that failed."""
    known, guide, text = Bytes().token_bytes(), constraint.begin(), b""
    closing = [token for token, content in enumerate(known) if content and content[-1:] in b'}]"']
    for step in range(most):
        words_W = torch.full((9,), -1, dtype=torch.int32)
        guide.allow(words_W)
        allowed = [token for token in range(272) if int(words_W[token // 32]) >> token % 32 & 1]
        if guide.failure is not None:
            return None
        ends = [token for token in allowed if token in (EOS, OTHER_EOS)]
        close = [token for token in closing if token in allowed]
        late = step > 20 and draw.random() < 0.7
        token = draw.choice(ends if ends and late else close if close and late else allowed)
        guide.take(token)
        text += known[token] or b""
        if guide.complete:
            return text
    return None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS, st.integers(0, 2**30), st.booleans())
def test_what_is_complete_is_valid(schema: dict[str, Any], seed: int, spaced: bool) -> None:
    whole = {**schema, **DEFINITIONS}
    try:
        constraint = Constrained(JsonSchema(whole, spaced), TOKENS)
    except ValueError:
        return  # refused, which `test_most_schemas_are_taken` bounds
    draw = random.Random(seed)
    for _ in range(3):
        text = walked(constraint, draw)
        if text is not None:
            found = json.loads(text.decode())
            jsonschema.validate(found, whole, cls=jsonschema.Draft202012Validator)
            assert spaced or text.decode().strip() == text.decode()


def test_most_schemas_are_taken_and_most_walks_end() -> None:
    """The test above sees something: of fixed schemas of every kind all are taken, and walks through them end."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "minLength": 2, "maxLength": 3},
        {"type": "integer", "minimum": -3, "maximum": 140},
        {"enum": ["ü\u2028", None, [1, "\\"]]},
        {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 1, "maxItems": 2},
        {"type": "object", "properties": {"a": {"const": "🙂"}, "": {"type": "number"}}, "required": ["a"]},
        {"anyOf": [{"type": "string", "format": "date"}, {"type": ["null", "boolean"]}]},
    ]
    ended = 0
    for schema in kinds:
        constraint = Constrained(JsonSchema({**schema, **DEFINITIONS}), TOKENS)
        for seed in range(4):
            text = walked(constraint, random.Random(seed))
            if text is not None:
                ended += 1
                jsonschema.validate(json.loads(text), {**schema, **DEFINITIONS})
    assert ended > 12
