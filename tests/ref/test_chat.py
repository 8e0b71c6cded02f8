"""Conversations become the text that transformers renders; without a template, the family's own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_ref.models import Model
from llama_ref.tokenizers.chat import MARK, chat_ids, chat_text
from llama_ref.tokenizers.chat_templates import LLAMA_2, LLAMA_3, templates_of
from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from llama_ref.tokenizers.tokenizer import RandomTokenizer, load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

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
    assert chat_text(Llama2(), CONVERSATIONS[1][:3]) == f"{first} {answer}"  # left open
    assert chat_text(Llama2(), CONVERSATIONS[1][:3], False) == f"{first} {answer} </s>"
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


ASSISTANT_LAST = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
)
REPEATS = "{% for m in messages %}{{ m.content }}={{ m.content | trim }}|{% endfor %}"
PARTS = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}
{{- eos_token }}{% endfor %}"""
UPPER = "{% for m in messages %}{{ m.content | upper }}.{% endfor %}"
FIRST = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
RENAMED = "{{ messages | tojson }}"
OPEN_TEMPLATES = {
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "rich": RICH,
    "trimming": CHATML.replace("message['content']", "message['content'] | trim"),
    "llama2": LLAMA_2,
    "llama3": LLAMA_3,
    "assistant last": ASSISTANT_LAST,
    "repeats": REPEATS,
    "parts": PARTS,
    "upper": UPPER,
    "first": FIRST,
    "renamed": RENAMED,
}
LAST_WORDS: list[Any] = [
    "Yes",
    " Yes.",
    "Yes. \n",
    "",
    " ",
    "Hi",
    MARK.strip(),
    [{"type": "text", "text": "a "}, {"type": "image"}],
]


@pytest.mark.parametrize("name", list(OPEN_TEMPLATES))
def test_a_last_message_left_open_is_transformers(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """Templates that trim, that append EOS, that show the message twice; where transformers refuses, so do we."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": OPEN_TEMPLATES[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for words in LAST_WORDS:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": words}]
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        except Exception:
            with pytest.raises(TokenizerError) as caught:
                chat_text(ours, messages, continue_final_message=True)
            assert "\n" not in str(caught.value)
            continue
        for left in ("CONTINUE_FINAL_MESSAGE_TAG ", "CONTINUE_FINAL_MESSAGE_TAG"):
            expected = expected.replace(left, "")  # transformers 5.24 forgets it where a template shows words twice
        for asked in (None, True):
            assert chat_text(ours, messages, continue_final_message=asked) == expected, words
            ids = theirs(expected, add_special_tokens=False)["input_ids"]
            assert chat_ids(ours, messages, continue_final_message=asked) == ids
        for prompt in (True, False):
            closed = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert chat_text(ours, messages, prompt, continue_final_message=False) == closed
            if not prompt:
                assert chat_text(ours, messages, prompt) == closed


def test_the_built_in_forms_stay_open_too() -> None:
    from tests.ref.test_tokenizer_witness import llama3

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So: \n"}]
    assert chat_text(Llama2(), talk) == "<s>[INST] Hi [/INST] So: \n"  # as transformers cuts what a space follows
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    text = chat_text(load_tokenizer(llama3().parent), talk)
    assert text.endswith(f"Hi<|eot_id|>{header}So:")
    assert chat_text(Llama2(), talk[:1], continue_final_message=True) == "<s>[INST] Hi"


def test_what_has_no_words_to_continue_is_refused_or_left_to_the_template() -> None:
    mute = Llama2()
    mute.chat_template = "{% for m in messages %}{{ m.content if m.content else '-' }}{% endfor %}"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
    assert chat_text(mute, talk) == "Hi-"
    with pytest.raises(TokenizerError, match="the last message has no text to continue"):
        chat_text(mute, talk, continue_final_message=True)
    mute.chat_template = FIRST  # shows nothing of the last message
    said = [talk[0], {"role": "assistant", "content": "Yes"}]
    assert chat_text(mute, said) == "Hi"
    with pytest.raises(TokenizerError, match="so it cannot be continued"):
        chat_text(mute, said, continue_final_message=True)


def saved_by_transformers(tokenizer: Any, directory: Path, templates: Any, files: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(directory)
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(directory)
    theirs.chat_template = templates
    for file in directory.iterdir():
        file.unlink()
    theirs.save_pretrained(directory, save_jinja_files=files)
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("files", [True, False], ids=["files", "tokenizer_config"])
@pytest.mark.parametrize(
    "templates",
    [
        CHATML,
        {"default": CHATML, "tool_use": ZEPHYR},
        {"tool_use": ZEPHYR, "rag": REPEATS},
        {"rag": REPEATS},
    ],
    ids=["one", "default", "no default", "one without default"],
)
def test_named_templates_are_read_as_transformers_writes_them(
    tokenizer: Any, tmp_path: Path, templates: Any, files: bool
) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = saved_by_transformers(tokenizer, tmp_path / "theirs", templates, files)
    ours = load_tokenizer(tmp_path / "theirs")
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    named = {"default": templates} if isinstance(templates, str) else templates
    for read in (ours, load_tokenizer(tmp_path / "again")):
        assert read.chat_templates == named
        for name in named:
            chosen = None if isinstance(templates, str) else name
            expected = theirs.apply_chat_template(
                CONVERSATIONS[0], chat_template=chosen, tokenize=False, add_generation_prompt=True
            )
            assert chat_text(read, CONVERSATIONS[0], chat_template=name) == expected
        known = ", ".join(sorted(named))
        with pytest.raises(TokenizerError, match=rf"no chat template is called 'x' \(known: {known}\)"):
            chat_text(read, CONVERSATIONS[0], chat_template="x")
        if "default" in named:
            assert chat_text(read, CONVERSATIONS[0]) == chat_text(read, CONVERSATIONS[0], chat_template="default")
        else:
            with pytest.raises(TokenizerError, match=rf"is called 'default': choose one \({known}\)"):
                chat_text(read, CONVERSATIONS[0])


def test_template_files_replace_those_of_the_settings(tokenizer: Any, tmp_path: Path) -> None:
    """As transformers reads them: one file of its own, and tokenizer_config.json's are none."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(REPEATS)
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_templates == theirs.chat_template == {"rag": REPEATS}


def test_templates_stand_beside_sentencepiece_and_tiktoken_files_too(tmp_path: Path) -> None:
    import shutil

    from llama_ref.convert import _copy_beside
    from tests.ref.test_tokenizer_witness import llama3

    shutil.copyfile(llama3(), tmp_path / "tokenizer.model")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(REPEATS)
    (tmp_path / "draft").mkdir()
    _copy_beside(tmp_path, tmp_path / "draft")
    for directory in (tmp_path, tmp_path / "draft"):
        with pytest.raises(TokenizerError, match=r"choose one \(rag\)"):
            chat_text(load_tokenizer(directory), CONVERSATIONS[0])


def test_templates_that_are_none_are_refused() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert templates_of({}, named, "x") == templates_of({}, {"tool_use": "t", "default": "d"}, "x")
    assert templates_of({}, None, "x") == {} and templates_of({}, "d", "x") == {"default": "d"}
    with pytest.raises(TokenizerError, match="x: chat_template is a int"):
        templates_of({}, 3, "x")
    for entry in (3, {"name": "a"}, {"name": 3, "template": "t"}, {"name": "a", "template": None}):
        with pytest.raises(TokenizerError, match=r"x: chat_template lists .* which has no name and template"):
            templates_of({}, [entry], "x")


def test_a_gguf_names_templates_as_llama_cpp_does() -> None:
    from llama_ref.tokenizers.gguf_tokenizer import settings_of

    facts: dict[str, Any] = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "gpt2"}
    facts |= {"tokenizer.chat_template.rag": REPEATS, "tokenizer.chat_templates": ["rag"]}
    assert templates_of({}, settings_of(facts)["chat_template"], "x") == {"rag": REPEATS}
    facts["tokenizer.chat_template"] = CHATML
    assert templates_of({}, settings_of(facts)["chat_template"], "x") == {"default": CHATML, "rag": REPEATS}


def test_a_gguf_brings_its_template(tokenizer: Any) -> None:
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.chat_template
    assert chat_text(tokenizer, CONVERSATIONS[0]).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
