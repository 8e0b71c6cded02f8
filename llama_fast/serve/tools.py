"""Calls of tools as JSON in a text: how a chat template has its model spell them, how one is made by force, how they are read.

Llama 3.1:  {"name": "look", "parameters": {"at": "Oslo"}}; {...}
Hermes:     <tool_call>
            {"name": "look", "arguments": {"at": "Oslo"}}
            </tool_call>
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llama_fast.engine.request import STOP
from llama_fast.grammars.asked import JsonSchema, Lark, quoted
from llama_fast.serve.bodies import Tool

CALLS = "tool_calls"
"""The finish_reason of an answer that calls."""


@dataclass(frozen=True)
class ToolForm:
    """How a call is spelled: what stands around its object, under which key its arguments are, and what may part two calls."""

    arguments: str
    before: str = ""
    after: str = ""
    between: str = ""


LLAMA_3 = ToolForm("parameters", between=";")
HERMES = ToolForm("arguments", "<tool_call>\n", "\n</tool_call>")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template asks its model for; None if it is not known here."""
    if "tools" not in template:
        return None
    spelled = template.replace('\\"', '"')  # inside a string of Jinja's
    if "<tool_call>" in spelled and '"arguments"' in spelled:
        return HERMES
    return LLAMA_3 if '"parameters"' in spelled else None


def by_force(form: ToolForm, tools: Sequence[Tool]) -> Lark:
    """The grammar of one call of one of these tools; ValueError for parameters that are no JSON schema."""
    rules = []
    for i, tool in enumerate(tools):
        function = tool.function
        head = f'{form.before}{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{form.arguments}": '
        schema = JsonSchema(NO_PARAMETERS if function.parameters is None else function.parameters)
        rules += [
            f"call{i}: {quoted(head)} given{i} {quoted('}' + form.after)}",
            f"given{i}: %json {schema.document()}",
        ]
    start = " | ".join(f"call{i}" for i in range(len(tools)))
    return Lark("\n".join([f"start: {start}", *rules]))


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """As OpenAI spells it, with an id of its own."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def calls_in(text: str, form: ToolForm, names: Collection[str]) -> list[Call]:
    """The calls that a text is made of, and nothing else; none if it is anything else, or calls a tool that is not there."""
    found: list[Call] = []
    before, after, left = form.before.strip(), form.after.strip(), text.strip()
    while left:
        if not left.startswith(before):
            return []
        try:
            call, end = json.JSONDecoder().raw_decode(left, _skipped(left, len(before)))
        except (ValueError, RecursionError):
            return []
        end = _skipped(left, end)
        if not left.startswith(after, end):
            return []
        if not isinstance(call, dict) or call.keys() != {"name", form.arguments}:
            return []
        name, arguments = call["name"], call[form.arguments]
        if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
            return []
        found.append(Call(name, arguments))
        left = left[end + len(after) :].lstrip().removeprefix(form.between).lstrip()
    return found


def _skipped(text: str, at: int) -> int:
    """Where the white space at a place ends: ("a  b", 1) -> 3."""
    return len(text) - len(text[at:].lstrip())


@dataclass(frozen=True)
class Offered:
    """The tools that an answer may call, and how it would spell that."""

    form: ToolForm
    names: frozenset[str]
    several: bool = True
    """Whether more than the first call is told."""


@dataclass(frozen=True)
class Said:
    """What a piece of an answer says: text, or at its end calls."""

    text: str
    calls: list[Call]
    finish_reason: str | None


class Reader:
    """One answer as it grows: what may yet be calls is held back until it is known. Without tools all is text at once."""

    def __init__(self, tools: Offered | None):
        self._tools = tools
        self._held = ""

    def read(self, text: str, finish_reason: str | None) -> Said:
        """More of the text; at its end with the reason."""
        if self._tools is None:
            return Said(text, [], finish_reason)
        held = self._held + text
        start, opening = held.lstrip(), self._tools.form.before.strip() or "{"
        if not start.startswith(opening[: len(start)]):
            self._tools = None  # it is text, and stays so
            return Said(held, [], finish_reason)
        if finish_reason is None:
            self._held = held
            return Said("", [], None)
        calls = calls_in(held, self._tools.form, self._tools.names) if finish_reason == STOP else []
        if not calls:
            return Said(held, [], finish_reason)
        return Said("", calls if self._tools.several else calls[:1], CALLS)
