"""The lm-evaluation-harness: the same answers from `llama_fast` as from its own `hf` model on one checkpoint."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_ref.checkpoint import open_checkpoint
from tests.ref.lora_files import write_adapter

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "42", "dogs", "run", "home", "é€"]
SPECIALS = ("<s>", "</s>", "<|eot_id|>", "<|im_end|>")
CONTEXT = 48
TEMPLATE = """{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}[assistant] {% endif %}"""
BRIEF = "{% for m in messages %}{{ m['content'] }}/{% endfor %}{{ mood }}{{ enable_thinking }}"
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_words": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "tiny_until": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "gen_prefix": "so:",
        "generation_kwargs": {"until": ["a", "<|eot_id|>"], "max_gen_toks": 12, "do_sample": False, "num_beams": 1},
        "metric_list": [{"metric": "exact_match"}],
    },
}
Save = Callable[[bool], Path]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """save(bos) writes a tiny random Llama that likes letters and special tokens, and a byte-level tokenizer."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def write(bos: bool) -> Path:
        directory = tmp_path_factory.mktemp("checkpoint")
        backend: Any = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=290, show_progress=False, initial_alphabet=alphabet)
        backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
        ids = {text: backend.token_to_id(text) for text in SPECIALS}
        if bos:
            lead = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
            backend.post_processor = lead
        named = {"default": TEMPLATE, "brief": BRIEF} if bos else TEMPLATE.replace("{{ bos_token }}", "")
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", chat_template=named
        ).save_pretrained(directory)
        torch.manual_seed(4)
        config = LlamaConfig(
            vocab_size=backend.get_vocab_size(),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.25,
            bos_token_id=ids["<s>"] if bos else None,
            eos_token_id=ids["</s>"],
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for token in range(config.vocab_size):
                text = backend.decode([token], skip_special_tokens=False)
                model.lm_head.weight[token] *= 2.5 if text in SPECIALS[1:] else 1 if text.isascii() else 0.1
        model.save_pretrained(directory)
        return directory

    return write


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def checkpoint(request: pytest.FixtureRequest, save: Save) -> Path:
    return save(request.param)


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def pair(checkpoint: Path, quiet: None) -> Callable[..., tuple[Any, Any]]:
    """pair(**arguments) is the class under test, in batches of three, and the harness's own, in batches of one."""

    def opened(**arguments: Any) -> tuple[Any, Any]:
        from lm_eval.models.huggingface import HFLM

        from llama_fast.lm_eval_model import LlamaFast

        ours = LlamaFast(pretrained=str(checkpoint), device="cpu", batch_size=3, **arguments)
        return ours, HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1, **arguments)

    return opened


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]  # type: ignore[arg-type]


def close(ours: Any, theirs: Any) -> None:
    """Numbers up to rounding, everything else exactly; the harness writes numbers of its samples as text or not."""
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
        return
    try:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4, abs=1e-4)
    except ValueError:
        assert ours == theirs


draw = random.Random(0)
TEXTS = [" ".join(draw.choices(WORDS, k=k)) for k in (1, 2, 5, 9, 14, 60)]
MODEL_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"max_length": 20},
    {"prefix_token_id": 5},
]


@pytest.mark.parametrize("arguments", MODEL_ARGUMENTS, ids=str)
def test_ids_are_those_of_the_hf_class(pair: Callable[..., Any], arguments: dict[str, Any]) -> None:
    ours, theirs = pair(**arguments)
    for name in ("eot_token_id", "prefix_token_id", "max_length", "max_gen_toks"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in (*TEXTS, "", " ", "\n", "<s>the cat", "</s>the cat", " <s>a"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        for added in (True, False):
            assert ours.tok_encode(text, add_special_tokens=added) == theirs.tok_encode(text, add_special_tokens=added)
        ids = theirs.tok_encode(text + "<|eot_id|>")
        for skip in (True, False):
            assert ours.tok_decode(ids, skip) == theirs.tok_decode(ids, skip)


@pytest.mark.parametrize("arguments", MODEL_ARGUMENTS, ids=str)
def test_log_likelihoods_are_those_of_the_hf_class(pair: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Also of requests longer than the context, with an empty side, or with white space alone for a context."""
    ours, theirs = pair(**arguments)
    contexts = (*TEXTS, "", " ", "\n", "the cat ")
    asked = [(one, other) for one in contexts for other in (" mat", " the cat sat", "a", "", " ", TEXTS[3])]
    served, refused = [], []
    for request in asked:
        try:
            theirs.loglikelihood(instances("loglikelihood", [request]), disable_tqdm=True)
            served.append(request)
        except (AssertionError, IndexError):
            refused.append(request)
    expected = theirs.loglikelihood(instances("loglikelihood", served), disable_tqdm=True)
    assert len(served) > 30 and refused
    close(ours.loglikelihood(instances("loglikelihood", served), disable_tqdm=True), expected)
    for request in refused:
        with pytest.raises(ValueError, match="a request") as caught:
            ours.loglikelihood(instances("loglikelihood", [request]), disable_tqdm=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", MODEL_ARGUMENTS, ids=str)
def test_rolling_log_likelihoods_are_those_of_the_hf_class(pair: Callable[..., Any], arguments: dict[str, Any]) -> None:
    ours, theirs = pair(**arguments)
    size = arguments.get("max_length", CONTEXT)
    edges = ["a" * length for length in range(size - 2, size + 3)]  # a token each
    requests = instances("loglikelihood_rolling", [(text,) for text in (*TEXTS, "\n", *edges, "a" * (3 * size), "")])
    close(ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True))


@pytest.mark.parametrize("arguments", [{}, {"add_bos_token": True}, {"max_length": 20}], ids=str)
def test_continuations_are_those_of_the_hf_class(pair: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Prompts beside prompts longer than the room, and stop strings of text, of special tokens, and of both."""
    ours, theirs = pair(**arguments)
    prompts = [*TEXTS, "<s>the cat", "the </s> cat <|eot_id|>"]

    def answers(model: Any, until: Any) -> Any:
        settings = {"until": until, "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
        requests = instances("generate_until", [(prompt, dict(settings)) for prompt in prompts])
        return model.generate_until(requests, disable_tqdm=True)

    free = answers(theirs, ["nowhere"])
    letters = [letter for text in free for letter in text if letter.isascii() and letter.isprintable()]
    untils = [["nowhere"], "</s>", ["<|eot_id|>"], ["<|im_end|>", "\n"], ["<|im_end|><|eot_id|>"], letters[:1]]
    untils += [[letters[0] + "<|eot_id|>", letters[-1]], ["<|eot_id|>" + letters[-1]], [letters[-1] + "<|im_end|>"]]
    found = [answers(theirs, until) for until in untils]
    assert len({str(texts) for texts in found}) > 3, "the stop strings end nothing"
    assert [answers(ours, until) for until in untils] == found


def test_other_words_for_the_same_settings_are_taken(pair: Callable[..., Any]) -> None:
    ours, theirs = pair()
    for more in (
        {"max_new_tokens": 5},
        {"max_tokens": 4},
        {"max_completion_tokens": 4, "max_gen_toks": 6},
        {"max_length": CONTEXT, "max_gen_toks": 8},
        {"num_beams": 1, "top_p": 0.5, "num_return_sequences": 1, "max_gen_toks": 8},
        {"repetition_penalty": 1.5, "max_gen_toks": 8},
    ):
        prompts = [("the cat", {"until": ["<|eot_id|>"], "do_sample": False, **more})]
        prompts += [("a", dict(prompts[0][1]))] if "max_length" not in more else []
        got, expected = (
            model.generate_until(instances("generate_until", prompts), disable_tqdm=True) for model in (ours, theirs)
        )
        assert got == expected, more


def test_a_prompt_that_is_asked_often_gets_as_many_answers(save: Save, quiet: None) -> None:
    """Tasks that sample repeat a request; the harness's --seed, which it gives PyTorch, gives the same answers again."""
    import torch

    from llama_fast.lm_eval_model import LlamaFast

    ours = LlamaFast(str(save(True)), "cpu", batch_size=3)
    settings = {"until": ["nowhere"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}

    def answers(of_harness: int, **more: Any) -> list[str]:
        torch.manual_seed(of_harness)
        return ours.generate_until(instances("generate_until", [("the cat", settings | more)] * 9))  # type: ignore[no-any-return]

    first = answers(1)
    assert len(set(first)) == 9 and answers(1) == first and answers(2) != first
    assert answers(1, seed=5) == answers(2, seed=5) != first


def test_conversations_are_those_of_the_hf_class(pair: Callable[..., Any]) -> None:
    ours, theirs = pair()
    talk = [("system", "S "), ("user", "Q? "), ("assistant", " The best "), ("user", "More"), ("assistant", "answer: ")]
    messages = [{"role": role, "content": content} for role, content in talk]
    for begin, end in ((0, 2), (0, 3), (1, 3), (0, 5), (1, 4)):
        for opened in (True, False):
            expected = theirs.apply_chat_template(messages[begin:end], opened)
            assert ours.apply_chat_template(messages[begin:end], opened) == expected
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_a_template_that_wants_no_system_gets_none(save: Save, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    from llama_fast.lm_eval_model import LlamaFast

    directory = save(False)
    text = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    (directory / "chat_template.jinja").write_text(text)
    ours, theirs = LlamaFast(str(directory), "cpu"), HFLM(pretrained=str(directory), device="cpu", dtype="float32")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no talk at all') }}")
    for told in (messages, messages[1:]):
        with pytest.raises(ValueError, match="no talk at all"):
            LlamaFast(str(directory), "cpu").apply_chat_template(told)


def test_a_template_is_chosen_by_its_name(save: Save, quiet: None) -> None:
    from llama_fast.lm_eval_model import LlamaFast

    directory, messages = str(save(True)), [{"role": "user", "content": "Q"}]
    by_argument = LlamaFast(
        directory, "cpu", chat_template="brief", chat_template_args={"mood": "!"}, enable_thinking=False
    )
    assert by_argument.apply_chat_template(messages) == "Q/!False"
    by_flag = LlamaFast(directory, "cpu")  # --apply_chat_template brief
    plain = by_flag.tokenizer_name
    assert by_flag.chat_template("brief") == BRIEF and by_flag.apply_chat_template(messages) == "Q/"
    assert by_flag.tokenizer_name != plain, "requests kept under one template serve the other"
    for refused in (lambda: by_flag.chat_template("other"), lambda: LlamaFast(directory, "cpu", chat_template="other")):
        with pytest.raises(ValueError, match=r"no chat template is called 'other' \(known: brief, default\)"):
            refused()


def test_what_was_thought_is_left_out(pair: Callable[..., Any]) -> None:
    for end in ("<|im_end|>", "e", "291", 291):
        ours, theirs = pair(think_end_token=end, enable_thinking=True)
        prompts = [(text, {"until": ["</s>"], "max_gen_toks": 12, "do_sample": False}) for text in TEXTS]
        got, expected = (
            model.generate_until(instances("generate_until", prompts), disable_tqdm=True) for model in (ours, theirs)
        )
        assert got == expected
        with pytest.raises(ValueError, match="enable_thinking=True is"):
            ours.loglikelihood(instances("loglikelihood", [("a", "b")]))


def test_an_adapter_has_the_harness_own_name(save: Save, quiet: None, tmp_path: Path) -> None:
    from llama_fast import Llama
    from llama_fast.lm_eval_model import LlamaFast

    directory = save(True)
    adapter = write_adapter(tmp_path / "adapter", open_checkpoint(directory).config, r=2)
    asked = instances("loglikelihood", [("the cat", " sat"), ("the", " mat")])
    plain, adapted = (
        LlamaFast(str(directory), "cpu", peft=peft).loglikelihood(asked, disable_tqdm=True)
        for peft in (None, str(adapter))
    )
    llama = Llama.from_pretrained(directory, device="cpu", adapter=adapter)
    told = []
    for context, continuation in (request.args for request in asked):
        start = len(llama.encode(context))
        told.append(sum(llama.score(context + continuation)[0][start - 1 :]))
    assert [value for value, _ in adapted] == pytest.approx(told, abs=1e-4)
    assert [value for value, _ in plain] != pytest.approx(told, abs=1e-2)


def test_what_changes_nothing_is_accepted_and_what_would_change_answers_is_refused(save: Save, quiet: None) -> None:
    from llama_fast.lm_eval_model import LlamaFast

    directory = str(save(True))
    LlamaFast(directory, "cpu", trust_remote_code=True, revision="main", parallelize=False, peft=None)
    assert LlamaFast(directory, "cpu", batch_size="auto:4", max_batch_size=5).batch_size == 5
    for arguments, message in (
        ({"peft": "no-adapter"}, "no-adapter: no such directory"),
        ({"parallelize": True}, "model argument parallelize=True is not supported"),
        ({"batch_size": "many"}, "batch_size=many: a whole number of rows, or auto"),
        ({"max_length": 49}, r"max_length=49 must lie in 1..48, the model's context"),
        ({"enable_thinking": True}, "enable_thinking=True needs think_end_token"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaFast(directory, "cpu", **arguments)  # type: ignore[arg-type]
    ours = LlamaFast(directory, "cpu")
    for settings, message in (
        ({"max_gen_toks": 48}, "max_gen_toks=48 leaves no room in a context of 48"),
        ({"max_gen_toks": 8, "max_length": 2}, "max_length=2: a prompt has"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate_until(instances("generate_until", [("the cat sat", settings)]))


@pytest.mark.parametrize("until", ["", [""], ["", "a"], ["e", ""]], ids=str)
def test_an_empty_stop_string_ends_an_answer_where_the_hf_class_ends_it(
    pair: Callable[..., Any], until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pair()
    prompts = [(text, {"until": until, "max_gen_toks": 8, "do_sample": False}) for text in TEXTS]
    expected = theirs.generate_until(instances("generate_until", prompts), disable_tqdm=True)
    logging.disable(logging.NOTSET)
    assert ours.generate_until(instances("generate_until", prompts)) == expected
    assert "until holds an empty text" in caplog.text


def stating(save: Save, **settings: Any) -> Path:
    """A checkpoint whose generation_config.json says more than ids."""
    directory = save(True)
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


@pytest.mark.parametrize(
    "stated",
    [
        {"repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 20},
        {"top_k": 1},
    ],
    ids=str,
)
def test_what_generation_config_says_of_all_answers_holds(save: Save, quiet: None, stated: dict[str, Any]) -> None:
    from lm_eval.models.huggingface import HFLM

    from llama_fast.lm_eval_model import LlamaFast

    directory = str(stating(save, **stated))
    ours = LlamaFast(directory, "cpu", batch_size=3)
    theirs = HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=1)
    ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.2}]
    ways += [{"do_sample": True, "temperature": 1.5}] if "top_k" in stated else []  # nothing left to draw
    for way in ways:
        prompts = [(text, {"until": ["nowhere"], "max_gen_toks": 8, **way}) for text in TEXTS]
        got, expected = (
            model.generate_until(instances("generate_until", prompts), disable_tqdm=True) for model in (ours, theirs)
        )
        assert got == expected, way


def test_what_generation_config_says_and_we_cannot_is_refused_by_name(
    save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    from llama_fast.lm_eval_model import LlamaFast

    ours = LlamaFast(str(stating(save, min_length=5, num_beams=2)), "cpu")
    asked = {"until": ["a"], "max_gen_toks": 4}
    with pytest.raises(ValueError, match=r"'min_length' is not supported with the value 5 .*generation_config.json"):
        ours.generate_until(instances("generate_until", [("the cat", asked)]))
    ours.generate_until(instances("generate_until", [("the cat", asked | {"min_length": 0, "num_beams": 1})]))
    ours.loglikelihood(instances("loglikelihood", [("the cat", " sat")]), disable_tqdm=True)
    LlamaFast(str(stating(save, max_new_tokens=3)), "cpu")
    assert "max_new_tokens=3 is ignored, max_gen_toks rules" in caplog.text


def test_draws_are_among_the_fifty_likeliest_as_of_transformers(save: Save, quiet: None) -> None:
    from llama_fast.lm_eval_model import LlamaFast

    ours = LlamaFast(str(save(True)), "cpu", batch_size=64)
    runner = ours.llama.runner
    import torch

    logits_V = runner.score(torch.tensor([ours.tok_encode("the cat")]))[0, -1]
    likeliest = {ours.tok_decode(int(token)) for token in logits_V.topk(50).indices}
    settings = {"until": [], "max_gen_toks": 1, "do_sample": True, "temperature": 50.0}
    drawn = ours.generate_until(instances("generate_until", [("the cat", settings)] * 64))
    assert set(drawn) <= likeliest
    free = ours.generate_until(instances("generate_until", [("the cat", settings | {"top_k": 0})] * 64))
    assert not set(free) <= likeliest


def test_without_a_gpu_the_harness_own_choice_of_cuda_is_the_cpu(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    """The harness's command asks for cuda where nobody did; its hf class takes the CPU then, and so does ours, aloud."""
    import torch

    from llama_fast.lm_eval_model import device_for

    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:0"):
            assert device_for(name).type == "cpu" and f"device={name}: this PyTorch sees no CUDA" in caplog.text
    assert device_for("cpu").type == "cpu"


def test_arguments_may_be_values_of_python(save: Save, quiet: None) -> None:
    """As a program hands them to the harness: a dtype, a path, numbers as text."""
    import torch

    from llama_fast.lm_eval_model import LlamaFast

    directory = save(True)
    for dtype in (torch.bfloat16, "bf16", "torch.bfloat16"):
        assert LlamaFast(directory, "cpu", dtype).llama.runner.dtype is torch.bfloat16  # type: ignore[arg-type]
    assert LlamaFast(str(directory), "cpu", batch_size="auto", max_batch_size="5").batch_size == 5  # type: ignore[arg-type]
    for arguments, message in (
        ({"dtype": "int8"}, "dtype: unknown dtype 'int8'"),
        ({"max_batch_size": 0}, "max_batch"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaFast(str(directory), "cpu", **arguments)  # type: ignore[arg-type]


def test_a_batch_that_does_not_fit_is_halved_where_the_harness_leaves_it_open(save: Save, quiet: None) -> None:
    import torch

    from llama_fast.lm_eval_model import LlamaFast

    asked: list[int] = []
    for size in ("auto", 8):
        ours = LlamaFast(str(save(True)), "cpu", batch_size=size, max_batch_size=8)
        whole = ours.llama.score_ids

        def short_of_memory(rows: Any, whole: Any = whole) -> Any:
            asked.append(len(rows))
            if len(rows) > 2:
                raise torch.OutOfMemoryError("no memory")
            return whole(rows)

        ours.llama.score_ids = short_of_memory  # type: ignore[method-assign]
        requests = instances("loglikelihood", [(text, " mat") for text in TEXTS])
        if size == "auto":
            assert len(ours.loglikelihood(requests, disable_tqdm=True)) == 6 and asked == [6, 4, 2, 2, 2]
        else:
            with pytest.raises(torch.OutOfMemoryError):
                ours.loglikelihood(requests, disable_tqdm=True)


def test_words_that_the_harness_uses_become_ours() -> None:
    from llama_fast.lm_eval_settings import generation_options

    assert generation_options({"until": "x", "do_sample": False, "temperature": 0.7}, 9) == (
        {"stop": ["x"], "temperature": 0.0},
        9,
    )
    assert generation_options({"until": ["", "x"], "temperature": 0.7, "top_p": 0.5, "max_gen_toks": 3}, 9) == (
        {"stop": ["x"], "temperature": 0.7, "top_p": 0.5},
        3,
    )
    assert generation_options({"do_sample": True, "top_k": 0, "seed": 3}, 9)[0] == {
        "stop": [],
        "temperature": 1.0,
        "seed": 3,
    }
    for settings, message in (
        ({"num_beams": 4}, "'num_beams' is not supported with the value 4"),
        ({"stop_sequences": ["x"]}, "'stop_sequences' is not supported"),
        ({"until": 3}, "until=3: a stop string is text"),
        ({"until": ["x", None]}, "a stop string is text"),
        ({"temperature": "warm"}, "temperature='warm': not a number"),
        ({"max_gen_toks": "many"}, "max_gen_toks='many': not a number"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks=inf: not a number"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3 must be at least 1"),
        ({"do_sample": "false"}, "do_sample='false' must be True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            generation_options(settings, 9)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    draw = random.Random(6)
    with (directory / "documents.jsonl").open("w") as file:
        for _ in range(24):
            question = " ".join(draw.choices(WORDS, k=draw.randint(2, 60)))
            choices = [" " + " ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(3)]
            print(json.dumps({"question": question, "choices": choices, "answer": draw.randrange(3)}), file=file)
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(directory / "documents.jsonl")}}
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (directory / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return directory


def evaluated(model: str, checkpoint: Path, tasks: Path, batch: int, out: Path) -> dict[str, Any]:
    """What the command says: metrics, and every answer."""
    command = [sys.executable, "-m", "llama_fast.ladder.cli", "lm-eval", "run", "--model", model, "--model_args"]
    command += [f"pretrained={checkpoint},dtype=float32", "--tasks", *TASKS, "--include_path", str(tasks)]
    command += ["--batch_size", str(batch), "--device", "cpu", "--output_path", str(out), "--log_samples"]
    command += ["--apply_chat_template"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out.parent / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {
        file.name.split("_2")[0]: [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(out.rglob("samples_*.jsonl"))
    }
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    return {"samples": samples, "results": results}


def test_the_harness_finds_what_its_own_hf_model_finds(save: Save, tasks: Path, tmp_path: Path) -> None:
    """By the command, conversations and all; most requests are longer than the context."""
    checkpoint = save(True)
    theirs = evaluated("hf", checkpoint, tasks, 1, tmp_path / "hf")
    ours = evaluated("llama_fast", checkpoint, tasks, 5, tmp_path / "fast")
    assert ours["samples"].keys() == theirs["samples"].keys() and len(ours["samples"]) == 3
    for name, samples in theirs["samples"].items():
        assert len(samples) == 24
        for one, other in zip(ours["samples"][name], samples, strict=True):
            close(one["filtered_resps"], other["filtered_resps"])
            assert one["arguments"] == other["arguments"]
    for task, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "stderr" not in metric:
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
