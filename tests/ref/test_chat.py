"""Conversations become the text that transformers renders; without a template, the family's own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_ref.chat import chat_ids, chat_text
from llama_ref.chat_templates import template_named, templates_of
from llama_ref.models import Model
from llama_ref.tokenizer import JsonTokenizer, RandomTokenizer, TokenizerError, load_tokenizer

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
RICH = """{{- bos_token }}{%- set ns = namespace(n=0) %}{% set d = dict(a=1) %}
{%- for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}
{%- set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m | tojson }}{% generation %}[{{ m.content | trim }}]{% endgeneration %}
{%- if ns.n > 3 %}{% break %}{% endif %}{%- endfor %}{{ d.a }}{{ messages | length }}{{ tools is defined }}"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief: <&> \"é\" 'x'"},
        {"role": "user", "content": "  two\nlines  "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "</s> 日本語 {{ 7 * 7 }}"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(default_model: Model) -> Any:
    return default_model.tokenizer()


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, ZEPHYR, RICH, None], ids=["chatml", "zephyr", "rich", "smollm2"])
def test_texts_are_those_of_transformers(tokenizer: Any, tmp_path: Path, template: str | None, prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if template is not None:
        settings["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path)
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert chat_text(ours, messages, prompt) == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert chat_ids(ours, messages, prompt) == list(ids)


def test_a_template_of_its_own_file_comes_first(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert chat_text(load_tokenizer(tmp_path), CONVERSATIONS[0]) == "Hi!"


class Llama2(RandomTokenizer):
    """No template, Llama 2's marks, and ids that are characters."""

    def __init__(self) -> None:
        super().__init__(1 << 21, 1, (2,))
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [ord(character) for character in text]


def test_llama_2s_own_form() -> None:
    """As Touvron et al. and Meta's code spell it: [INST] <<SYS>> ... <</SYS>> ... [/INST] answer </s><s>[INST] ..."""
    system, user, answer = CONVERSATIONS[1][0]["content"], "two\nlines", "Yes."
    assert chat_text(Llama2(), CONVERSATIONS[0]) == "<s>[INST] Hi [/INST]"
    first = f"<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]"
    assert chat_text(Llama2(), CONVERSATIONS[1][:2]) == first
    assert chat_text(Llama2(), CONVERSATIONS[1][:3]) == f"{first} {answer} </s>"
    last = CONVERSATIONS[1][3]["content"]
    assert chat_text(Llama2(), CONVERSATIONS[1]) == f"{first} {answer} </s><s>[INST] {last} [/INST]"


def test_llama_3s_own_form() -> None:
    from tests.ref.test_tokenizer_witness import llama3

    tokenizer = load_tokenizer(llama3().parent)
    assert chat_text(tokenizer, CONVERSATIONS[0]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert chat_ids(tokenizer, CONVERSATIONS[0])[:4] == [128000, 128006, 882, 128007]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["hello"], "a message must be"),
        ([{"content": "x"}], "a message must be"),
        ([{"role": "user", "content": ["parts"]}], "content must be text"),
        ([{"role": "assistant", "content": "x"}], "roles must alternate"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "x"}], "roles must alternate"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        chat_text(Llama2(), messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{% set ns = namespace(a=1) %}{% set ns.__class__ = 2 %}",
        "{{ messages[0].content.format.__globals__ }}{{ raise_exception('x') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for x in range(1000000000) %}{% endfor %}",
        "{{ nothing.at.all }}",
        "{% if %}",
    ],
)
def test_a_template_gets_nothing_of_python(template: str) -> None:
    tokenizer = Llama2()
    tokenizer.chat_template = template
    with pytest.raises(TokenizerError, match="the chat template refuses"):
        chat_text(tokenizer, CONVERSATIONS[0])


def test_named_templates_mean_the_default_one() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert template_of(named, "x") == "d" and template_of(named[:1], "x") is None
    with pytest.raises(TokenizerError, match="chat_template is a int"):
        template_of(3, "x")


def test_a_gguf_brings_its_template(tokenizer: Any) -> None:
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.chat_template
    assert chat_text(tokenizer, CONVERSATIONS[0]).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
