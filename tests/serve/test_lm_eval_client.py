"""lm-eval's own client of such servers gets the numbers that `llama-fast lm-eval` gets from the same model."""

from __future__ import annotations

import logging
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
