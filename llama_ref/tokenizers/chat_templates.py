"""Chat templates: which of them a checkpoint has, by name, and which one is meant.

A checkpoint has one template, or several by name of which "default" is meant unless the caller names another. They stand
in tokenizer_config.json, or in files of their own, which then replace those of tokenizer_config.json: "default" in
chat_template.jinja, every other one in additional_chat_templates/NAME.jinja. A checkpoint without any gets the form that
its family was taught.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.tokenizer_files import TEMPLATE_FILE, TokenizerError, read_text

DEFAULT = "default"
FOLDER = "additional_chat_templates"
SUFFIX = ".jinja"

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
BUILT_IN = (LLAMA_2, LLAMA_3)


def template_named(tokenizer: Tokenizer, name: str | None = None) -> str:
    """The template of this name; None means the default one. Raises TokenizerError, with the names that there are."""
    names = ", ".join(sorted(tokenizer.chat_templates)) or "none: this checkpoint has no chat template"
    if name is not None:
        if name not in tokenizer.chat_templates:
            raise TokenizerError(f"no chat template is called {name!r} (known: {names})")
        return tokenizer.chat_templates[name]
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if tokenizer.chat_templates:
        raise TokenizerError(f"none of this checkpoint's chat templates is called {DEFAULT!r}: choose one ({names})")
    return LLAMA_3 if len(tokenizer.encode("<|start_header_id|>", bos=False)) == 1 else LLAMA_2


def template_files(directory: Path) -> dict[str, str]:
    """The template files of a directory, by their names in it: {"chat_template.jinja": text, ...}."""
    found = [directory / TEMPLATE_FILE, *sorted((directory / FOLDER).glob(f"*{SUFFIX}"))]
    return {file.relative_to(directory).as_posix(): read_text(file) for file in found if file.is_file()}


def template_name(file: str) -> str | None:
    """ "chat_template.jinja" -> "default", "additional_chat_templates/rag.jinja" -> "rag", "config.json" -> None."""
    folder, _, name = file.rpartition("/")
    if file == TEMPLATE_FILE:
        return DEFAULT
    return name.removesuffix(SUFFIX) if folder == FOLDER and name.endswith(SUFFIX) else None


def templates_of(files: Mapping[str, str], stated: Any, where: object) -> dict[str, str]:
    """Name -> template, of a directory's files (as from `template_files`) and its tokenizer_config.json's `chat_template`.

    templates_of({}, [{"name": "rag", "template": "..."}], "tokenizer_config.json") -> {"rag": "..."}
    """
    of_files = {name: text for file, text in files.items() if (name := template_name(file)) is not None}
    if of_files or stated is None:
        return of_files
    if isinstance(stated, str):
        return {DEFAULT: stated}
    if isinstance(stated, dict):
        stated = [{"name": name, "template": text} for name, text in stated.items()]
    if not isinstance(stated, list):
        raise TokenizerError(f"{where}: chat_template is a {type(stated).__name__}, not text")
    named: dict[str, str] = {}
    for entry in stated:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise TokenizerError(f"{where}: chat_template lists {entry!r:.60}, which has no name and template")
        named[name] = text
    return named
