"""A replica of two ranks, and replicas that are chosen by what they have read: `tox -e ray`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_fast import Llama
from tests.serve.ray_cluster import Cluster, tiny_model, until
from tests.serve.test_leaving import PATH

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("replicas") / "model")


def test_a_replica_of_two_ranks_answers_as_one_process_and_comes_back_when_a_rank_is_killed(model: Path) -> None:
    expected = Llama.from_pretrained(model, device="cpu").generate("the cat sat", 30).text
    body: dict[str, Any] = {"prompt": "the cat sat", "max_tokens": 30, "temperature": 0}
    with Cluster(cpus=2, model=str(model), ranks=2, rows=3, length=2048) as cluster, cluster.client() as http:

        def others() -> list[Any]:
            return [one for one in cluster.processes() if any("ray::Rank" in word for word in one.cmdline())]

        assert http.post(PATH, json=body).json()["choices"][0]["text"] == expected
        assert len(others()) == 1 and len(cluster.replica_processes()) == 1
        before = cluster.replicas()
        with http.stream(
            "POST", PATH, json={**body, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            others()[0].kill()
            rest = list(lines)
        assert "replica_lost" in rest[-1]
        assert http.post(PATH, json=body).json()["choices"][0]["text"] == expected  # it waits for the next replica
        until(lambda: len(cluster.replicas()) == 1 and cluster.replicas() != before)
        assert len(others()) == 1


@pytest.fixture(scope="module")
def choosing(model: Path) -> Iterator[Cluster]:
    arguments: dict[str, Any] = {"placement": "prefix", "replicas": 2, "rows": 4, "length": 2048}
    with Cluster(cpus=3, model=str(model), **arguments) as running:
        until(lambda: len(running.replicas()) == 2, 120)
        yield running


def test_requests_that_begin_alike_find_what_was_read_in_the_same_replica(choosing: Cluster) -> None:
    """Two long beginnings, each asked six times: all but the first find its pages, and requests without a prompt are answered."""
    with choosing.client() as http:
        for number in range(6):
            for word in ("cats ", "dogs "):
                body = {"prompt": word * 100 + str(number), "max_tokens": 2}
                assert http.post(PATH, json=body).status_code == 200
        for odd in ({"prompt": [1, 2, 3]}, {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}):
            assert http.post(PATH, json={**odd, "max_tokens": 1}).status_code == 200
        assert http.post(PATH, json={"prompt": ""}).status_code == 400
        assert http.get("/v1/models").status_code == 200
    assert choosing.count("reused_prompt_tokens_total") >= 2 * 5 * 480


def test_a_replica_that_is_killed_is_not_chosen_again_for_what_it_had_read(choosing: Cluster) -> None:
    with choosing.client() as http:
        body = {"prompt": "birds " * 100, "max_tokens": 2}
        for _ in range(2):
            assert http.post(PATH, json=body).status_code == 200
        before = choosing.replicas()
        for victim in choosing.replica_processes():
            victim.kill()
            assert http.post(PATH, json=body).status_code == 200
        until(lambda: len(now := choosing.replicas()) == 2 and not now & before, 180)
        assert http.post(PATH, json=body).status_code == 200
