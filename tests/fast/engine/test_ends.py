"""What ends a text, and what of it is shown: special tokens, EOS ids and open turns, beside transformers' own answers.

The models are chains: each token has one successor, so that a text is known before it is generated.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_fast import Llama
from llama_fast.chat import Chat
from llama_fast.ladder.cli import talk

MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|stop|>")
CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}>{{ m['content'] }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant>{% endif %}"""
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
Make = Callable[..., Path]


def byte_level(words: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(words)] * 9, trainer)
    return backend


def sentencepiece_like(words: list[str]) -> Any:
    """As Llama 2's tokenizer.json: a space before every text, bytes for what is not in the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set("".join(words)) | {"▁"})]
    merges = [("▁" + word[:i], word[i]) for word in words if word.isascii() for i in range(len(word))]
    names += [one + other for one, other in merges]
    vocabulary = {name: token for token, name in enumerate(dict.fromkeys(names))}
    backend: Any = Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


BACKENDS = {"bytes": byte_level, "sentencepiece": sentencepiece_like}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(backend, chain, special=, eos=, **settings) saves a model that writes `chain`, a list of texts and marks."""
    import torch
    from tokenizers import AddedToken
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(
        kind: str, chain: list[str], special: bool = True, eos: tuple[str, ...] = ("</s>",), **settings: Any
    ) -> Path:
        backend = BACKENDS[kind]([text for text in chain if text not in MARKS])
        added = [AddedToken(mark, special=special, normalized=False) for mark in MARKS]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
        ids = [token for text in chain for token in backend.encode(text, add_special_tokens=False).ids]
        assert len(set(ids)) == len(ids), "a token has one successor"
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=backend.get_vocab_size(),
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=[backend.token_to_id(mark) for mark in eos],
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.zero_()
            model.model.norm.weight.fill_(1)
            embeddings = torch.randn(config.vocab_size, 64)
            model.model.embed_tokens.weight.copy_(embeddings)
            for one, other in itertools.pairwise(ids):
                model.lm_head.weight[other] += embeddings[one]
        model.save_pretrained(tmp_path)
        backend.save(str(tmp_path / "tokenizer.json"))
        stated = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **settings}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
        return tmp_path

    return write


def spelled(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


WORDS = ["say", "hello", "world", "<|im_end|>", "user", "<|im_start|>", "<|stop|>", "café", "</s>"]
STOPS = [
    ["<|im_end|>"],
    ["<|im_end|>user", "nowhere"],
    ["<|im_end|> user"],
    ["world<|im_end|>"],
    ["rld<|im_end|>us"],
    ["im_end"],
    ["<|im_start|><|stop|>"],
    ["<|stop|>caf"],
    ["user"],
    ["é"],
    ["</s>", "er<|im_start|>"],
    ["caf"],
]


@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("kind", list(BACKENDS))
def test_a_stop_string_may_hold_special_tokens_and_none_is_shown(make: Make, kind: str, stop: list[str]) -> None:
    """Tokens end where transformers' end; the text is what stands before the stop string, without special tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = make(kind, WORDS, eos_token="</s>")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    llama = Llama.from_pretrained(directory, device="cpu")
    chain = [token for text in WORDS for token in tokenizer.encode(text, add_special_tokens=False)]
    prompts = [chain[: chain.index(tokenizer.encode(text, add_special_tokens=False)[0])] for text in ("hello", "world")]
    outputs = llama.generate(prompts, 40, stop=stop)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=40,
            do_sample=False,
            stop_strings=stop,
            tokenizer=tokenizer,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert output.ids == expected and output.finish_reason == "stop"
        text = spelled(tokenizer, [*prompt, *expected])[len(spelled(tokenizer, prompt)) :]
        shown = text[: min((text.find(word) for word in stop if word in text), default=len(text))]
        for mark in MARKS:
            shown = shown.replace(mark, "")
        shown = shown.removesuffix("<|")  # "im_end" begins within a special token
        assert output.text == shown == "".join(llama.stream(prompt, 40, stop=stop))


@pytest.mark.parametrize("kind", list(BACKENDS))
@pytest.mark.parametrize("named", [("</s>",), ("<|im_end|>", "</s>")], ids=str)
def test_an_eos_id_is_never_shown_whatever_the_files_call_it(make: Make, kind: str, named: tuple[str, ...]) -> None:
    """The config names it, tokenizer.json calls it plain text, and generation_config.json may name another."""
    directory = make(kind, ["hello", "world", "<|im_end|>", "user", "</s>"], special=False, eos=named)
    facts = json.loads((directory / "generation_config.json").read_text()) | {"eos_token_id": None}
    (directory / "generation_config.json").write_text(json.dumps(facts))
    llama = Llama.from_pretrained(directory, device="cpu")
    prompts = [llama.tokenizer.encode(text, bos=False) for text in ("hello", "hello world")]
    outputs = llama.generate(prompts, 30)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finish_reason == "stop" and output.ids[-1] in llama.runner.config.eos_ids
        assert not any(mark in output.text for mark in named) and "".join(llama.stream(prompt, 30)) == output.text
    assert outputs[0].text.strip() == ("world" if len(named) == 2 else outputs[0].text.strip())


def test_an_eos_that_generation_config_adds_is_not_fed_back(make: Make) -> None:
    directory = make(
        "bytes", [">", "hello", "world", "<|im_end|>"], special=False, chat_template=CHATML, eos_token="</s>"
    )
    end = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    token = next(entry["id"] for entry in end if entry["content"] == "<|im_end|>")
    facts = json.loads((directory / "generation_config.json").read_text()) | {"eos_token_id": [token]}
    (directory / "generation_config.json").write_text(json.dumps(facts))
    chat = Chat(Llama.from_pretrained(directory, device="cpu"))
    assert "".join(chat.say("Q")) == "helloworld"
    assert chat.messages[-1] == {"role": "assistant", "content": "helloworld"}


@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["keeps", "trims"])
def test_a_reply_goes_on_from_its_first_words(make: Make, template: str, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    chain = ["hello", " ", "world", "x", "<|im_end|>"]
    directory = make("bytes", chain, chat_template=template, eos=("<|im_end|>",), eos_token="<|im_end|>")
    llama, theirs = Llama.from_pretrained(directory, device="cpu"), AutoTokenizer.from_pretrained(directory)
    user = {"role": "user", "content": "Q"}
    for begun, said in (("hello", " worldx"), ("hello ", "worldx" if template == CHATML else " worldx")):
        talked = [user, {"role": "assistant", "content": begun}]
        text = theirs.apply_chat_template(talked, tokenize=False, continue_final_message=True)
        assert llama.encode(talked) == theirs.encode(text, add_special_tokens=False)
        assert llama.generate(talked, 9).text == said == "".join(llama.stream(talked, 9))
        chat = Chat(llama)
        assert "".join(chat.say("Q", begin=begun)) == said
        assert chat.messages == [user, {"role": "assistant", "content": "hello worldx"}]
        chat.messages = talked
        assert "".join(chat.go_on()) == said and chat.messages[-1]["content"] == "hello worldx"
    if template == CHATML:  # the other one forgets a space at the end
        short = Chat(llama, max_new_tokens=1)
        rest = "".join(short.say("Q", begin="hello")) + "".join(short.go_on())
        assert " world".startswith(rest) and len(rest) > 1 and short.messages[-1]["content"] == "hello" + rest
        assert short.reused_tokens > 3
    with pytest.raises(ValueError, match="no reply to go on with"):
        Chat(llama).go_on()


def test_the_command_begins_replies_and_has_them_go_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = make("bytes", ["hello", " ", "world", "x", "<|im_end|>"], chat_template=CHATML, eos=("<|im_end|>",))
    lines = iter(["/more", "Q", "/more", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat = Chat(Llama.from_pretrained(directory, device="cpu"), max_new_tokens=1)
    talk(chat, False, "hello")
    told = capsys.readouterr()
    assert told.out.splitlines()[1] == "hello " and "world".startswith(told.out.splitlines()[2])
    assert told.err.count("error: ") == 1


def test_a_conversation_that_cannot_go_on_is_one_line(make: Make) -> None:
    mute = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    llama = Llama.from_pretrained(make("bytes", ["hello", "</s>"], chat_template=mute), device="cpu")
    talked = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(ValueError, match="so it cannot be continued") as caught:
        llama.generate(talked, 4)
    assert "\n" not in str(caught.value)


def test_a_template_is_chosen_by_its_name(make: Make) -> None:
    named = [{"name": "rag", "template": CHATML}, {"name": "brief", "template": "{{ messages[0]['content'] }}"}]
    directory = make("bytes", ["hello", "</s>"], chat_template=named)
    brief = Llama.from_pretrained(directory, device="cpu", chat_template="brief")
    messages = [{"role": "user", "content": "hello"}]
    assert brief.encode(messages) == brief.tokenizer.encode("hello", bos=False)
    with pytest.raises(ValueError, match=r"none .* is called 'default': choose one \(brief, rag\)"):
        Llama.from_pretrained(directory, device="cpu").generate(messages, 4)
    with pytest.raises(ValueError, match=r"no chat template is called 'x' \(known: brief, rag\)"):
        Llama.from_pretrained(directory, device="cpu", chat_template="x")
