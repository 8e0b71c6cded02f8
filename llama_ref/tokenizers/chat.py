"""Conversations as text: a template of the checkpoint's, or the form its family was taught, in Jinja's sandbox.

A template comes with the checkpoint and is not trusted: it sees plain data, and none of Python.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llama_ref.tokenizers.chat_templates import BUILT_IN, template_named
from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}; a template may know more."""

MARK = "THE_FINAL_MESSAGE_ENDS_HERE "
"""What is put behind a message that is to be continued; its space tells whether the template keeps space there."""


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    continue_final_message: bool | None = None,
    chat_template: str | None = None,
) -> list[int]:
    """The ids of a conversation, up to where the next reply starts, or the last one goes on; raises TokenizerError."""
    text = chat_text(tokenizer, messages, add_generation_prompt, continue_final_message, chat_template)
    return tokenizer.encode(text, bos=False)


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    continue_final_message: bool | None = None,
    chat_template: str | None = None,
    **variables: Any,
) -> str:
    """A conversation as the checkpoint spells it, BOS included; `variables` are what a template may ask for besides.

    chat_text(llama2, [{"role": "user", "content": "Hi"}]) -> "<s>[INST] Hi [/INST]". `chat_template` is the name of one
    of the checkpoint's templates. `continue_final_message` leaves the last message open, so that the model goes on in
    it. None does so where a reply is wanted, the last words are the assistant's, and the template shows them.
    Raises TokenizerError.
    """
    if not messages:
        raise TokenizerError("a conversation needs at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"a message must be {{'role': ..., 'content': ...}}, not {message!r:.80}")
    template = template_named(tokenizer, chat_template)
    if template in BUILT_IN and not all(isinstance(message.get("content"), str) for message in messages):
        raise TokenizerError("this checkpoint has no chat template, so a message's content must be text")
    # plain data: an object's methods would be the template's to call
    plain: dict[str, Any] = json.loads(json.dumps({"messages": list(messages), **variables}, default=str))
    # what is null is absent: templates would spell it "None"
    plain["messages"] = [{key: value for key, value in one.items() if value is not None} for one in plain["messages"]]
    plain = {"bos_token": "", "eos_token": "", "tools": None, "documents": None} | tokenizer.special_tokens | plain
    if continue_final_message or (continue_final_message is None and add_generation_prompt and may_go_on(messages)):
        text = _left_open(template, plain, must=continue_final_message is True)
        if text is not None:
            return text
    return _rendered(template, {"add_generation_prompt": add_generation_prompt, **plain})


def may_go_on(messages: Sequence[Message]) -> bool:
    """Whether a conversation ends with words of the assistant, which a model could go on with."""
    return bool(messages) and messages[-1].get("role") == "assistant" and last_words(messages[-1]) is not None


def last_words(message: Message) -> str | None:
    """The text of a message, of several parts the last one's: {"content": [{"type": "text", "text": "Hi"}]} -> "Hi"."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = next((part["text"] for part in reversed(content) if _is_text(part)), None)
    return content if isinstance(content, str) else None


def with_words(message: Message, words: str) -> dict[str, Any]:
    """The message with other last words: ({"role": "assistant", "content": "Ye"}, "Yes") -> {..., "content": "Yes"}."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": words}
    last = max(i for i, part in enumerate(content) if _is_text(part))
    return {**message, "content": [*content[:last], {**content[last], "text": words}, *content[last + 1 :]]}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and "text" in part


def _left_open(template: str, plain: Mapping[str, Any], must: bool) -> str | None:
    """The conversation up to the end of its last message's words, as transformers 5 cuts it.

    Where the template shows nothing of that message there is nothing to leave open: None, or an error where it `must`.
    """
    *earlier, last = plain["messages"]
    words = last_words(last)
    if words is None:
        raise TokenizerError("the last message has no text to continue")
    mark = MARK
    while mark.strip() in str(plain["messages"]):  # somebody talks of it
        mark = f"X{mark}"
    marked = [*earlier, with_words(last, words + mark)]
    text = _rendered(template, {**plain, "add_generation_prompt": False, "messages": marked})
    end = text.rfind(mark.strip())
    if end < 0 and not must and (not words.strip() or words.strip() not in text):
        return None
    if end < 0 or words.strip() not in text or "content" not in template:
        raise TokenizerError("the chat template does not show the last message as it is, so it cannot be continued")
    kept = text[:end] if text[end:].startswith(mark) else text[:end].rstrip()
    return kept.replace(mark, "").replace(mark.strip(), "")  # of templates that show the message twice


def _rendered(template: str, names: Mapping[str, Any]) -> str:
    try:
        text: str = _compiled(template).render(**names)
        return text
    except Exception as error:  # a template raises what it likes
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise TokenizerError(f"the chat template refuses this conversation: {told}") from error


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
