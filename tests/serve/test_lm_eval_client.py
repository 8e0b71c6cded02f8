"""lm-eval's own client of such servers gets the numbers that `llama-fast lm-eval` gets from the same model."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_fast import Llama
from llama_ref.checkpoint import save_checkpoint
from tests.serve.conftest import Running, until

PAIRS = [
    ("the cat sat on", " a mat"),
    ("the dogs", " saw home and a cat"),
    ("a", "b"),
    ("é€", " run"),
    ("42", " the the the"),
]
TEXTS = ["the cat", "dogs run home and", "a mat"]


@pytest.fixture(scope="module")
def directory(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lm_eval") / "model"
    checkpoint = llama.runner.checkpoint
    save_checkpoint(place, checkpoint.config, dict(checkpoint.weights), tokenizer=llama.tokenizer)
    return place


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture
def ours(directory: Path) -> Any:
    from llama_fast.lm_eval_model import LlamaFast

    return LlamaFast(pretrained=str(directory), device="cpu", batch_size=2, add_bos_token=False)


def client(running: Running, directory: Path, **options: Any) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"{running.url}/v1/completions"
    return LocalCompletionsAPI(base_url=url, model="tiny", tokenizer=str(directory), max_retries=1, **options)


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}], ids=["one by one", "in batches"])
def test_log_likelihoods_are_the_harness_models(
    running: Running, directory: Path, ours: Any, options: dict[str, Any]
) -> None:
    asked = client(running, directory, **options)
    found = asked.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    expected = ours.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert len({logprob for logprob, _ in expected}) == len(PAIRS)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    until(running.is_empty)


def test_greedy_texts_are_the_harness_models(running: Running, directory: Path, ours: Any) -> None:
    settings = {"until": ["sat", "\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0}
    requests = [(text, dict(settings)) for text in TEXTS]
    found = client(running, directory).generate_until(instances("generate_until", requests), disable_tqdm=True)
    expected = ours.generate_until(instances("generate_until", requests), disable_tqdm=True)
    assert found == expected and any(found)


CHOICE: dict[str, Any] = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
UNTIL: dict[str, Any] = {
    "task": "tiny_until",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{written}}",
    "generation_kwargs": {"until": ["a", "\n\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run", "home", "é€"]


def documents(llama: Llama) -> list[dict[str, Any]]:
    """Some have the answer that the model gives, so that scores are neither all right nor all wrong."""
    draw = random.Random(6)
    found = []
    for number in range(16):
        question = " ".join(draw.choices(WORDS, k=draw.randint(2, 40)))
        chat = number % 3 == 1
        prompt: Any = [{"role": "user", "content": question}] if chat else question
        written: Any = llama.generate(prompt, 12, temperature=0, stop=["a", "\n\n"])
        choices = [" " + " ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(3)]
        target = written.text if number % 3 < 2 else "nothing of this"
        found.append({"question": question, "choices": choices, "answer": draw.randrange(3), "written": target})
    return found


def scores(model: Any, tasks: list[dict[str, Any]], docs: list[dict[str, Any]], chat: bool) -> dict[str, float]:
    """What the harness says of a model: every metric of every task."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    splits = {"test_split": "test", "num_fewshot": 0, "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)}}
    made = TaskManager(include_defaults=False).load([ConfigurableTask(config={**task, **splits}) for task in tasks])
    found = evaluate(model, made, apply_chat_template=chat, bootstrap_iters=0, log_samples=False)
    assert found is not None
    return {
        f"{task}: {metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def test_completion_tasks_have_the_scores_of_the_harness_model(
    running: Running, directory: Path, ours: Any, llama: Llama
) -> None:
    docs = documents(llama)
    found = scores(client(running, directory), [CHOICE, UNTIL], docs, chat=False)
    expected = scores(ours, [CHOICE, UNTIL], docs, chat=False)
    assert found == pytest.approx(expected) and len(found) == 3
    assert 0 < found["tiny_until: exact_match,none"] < 1
    until(running.is_empty)


@pytest.mark.parametrize("prefix", [None, "so:"], ids=["a reply", "words to go on with"])
def test_chat_tasks_have_the_scores_of_the_harness_model(
    running: Running, ours: Any, llama: Llama, prefix: str | None
) -> None:
    """Each speaks to the model through its chat template: ours in its own process, the client's in the server."""
    from lm_eval.models.openai_completions import LocalChatCompletion

    docs, task = documents(llama), {**UNTIL, "gen_prefix": prefix}
    asked = LocalChatCompletion(base_url=f"{running.url}/v1/chat/completions", model="tiny", max_retries=1)
    found, expected = (scores(model, [task], docs, chat=True) for model in (asked, ours))
    assert found == pytest.approx(expected) and len(found) == 1
    assert prefix is not None or 0 < found["tiny_until: exact_match,none"] < 1
    until(running.is_empty)
