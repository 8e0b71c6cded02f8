"""Conversations as text: the checkpoint's own template, in Jinja's sandbox; without one, the form its family was taught.

A template comes with the checkpoint and is not trusted: it sees plain data, and none of Python.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llama_ref.tokenizer import Tokenizer, TokenizerError

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}; a template may know more."""

# Llama 2 (Touvron et al. 2023): every turn of the user starts a text of its own; the system's words go into the first.
LLAMA_2 = """
{%- set start = 0 -%}
{%- if messages[0]['role'] == 'system' %}{% set start = 1 %}{% endif -%}
{%- for message in messages[start:] -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('roles must alternate: user, assistant, user, ...') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' -}}
        {%- if loop.first and start %}{{ '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' }}{% endif -%}
        {{- message['content'].strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
# Llama 3: a header names the speaker, an end-of-turn token closes.
LLAMA_3 = """
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
    """The ids of a conversation, up to where the next reply starts; raises TokenizerError."""
    return tokenizer.encode(chat_text(tokenizer, messages, add_generation_prompt), bos=False)


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
) -> str:
    """A conversation as the checkpoint spells it, BOS included; `variables` are what a template may ask for besides.

    chat_text(llama2, [{"role": "user", "content": "Hi"}]) -> "<s>[INST] Hi [/INST]". Raises TokenizerError.
    """
    if not messages:
        raise TokenizerError("a conversation needs at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"a message must be {{'role': ..., 'content': ...}}, not {message!r:.80}")
    template = tokenizer.chat_template
    if template is None:
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise TokenizerError("this checkpoint has no chat template, so a message's content must be text")
        headed = len(tokenizer.encode("<|start_header_id|>", bos=False)) == 1
        template = LLAMA_3 if headed else LLAMA_2
    # plain data: an object's methods would be the template's to call
    plain: dict[str, Any] = json.loads(json.dumps({"messages": list(messages), **variables}, default=str))
    plain = {"bos_token": "", "eos_token": "", "tools": None, "documents": None} | tokenizer.special_tokens | plain
    try:
        text: str = _compiled(template).render(add_generation_prompt=add_generation_prompt, **plain)
        return text
    except Exception as error:  # a template raises what it likes
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise TokenizerError(f"the chat template refuses this conversation: {told}") from error


def template_of(stated: Any, where: object) -> str | None:
    """A tokenizer_config.json's `chat_template`: text, or several by name, of which "default" is meant."""
    if isinstance(stated, list):
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        stated = named.get("default")
    if stated is None or isinstance(stated, str):
        return stated
    raise TokenizerError(f"{where}: chat_template is a {type(stated).__name__}, not text")


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """A template made ready, with the names that chat templates may count on."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks a reply for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own spelling

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace takes no name that starts with an underscore: {name!r}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["namespace"] = PlainNamespace
    environment.globals["dict"] = lambda **entries: entries
    return environment.from_string(template)
