"""Replicas on Ray Serve: one that is started as the README says, what is refused, and how requests and ranks are told."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from openai import OpenAI

from llama_fast import Llama
from llama_fast.serve.app import application
from llama_fast.serve.metrics import Metrics, Together, labelled
from llama_fast.serve.ray.arguments import read
from llama_fast.serve.ray.calls import beginning
from llama_fast.serve.ray.gateway import PATHS
from llama_fast.serve.ray.group import Seat, environments
from llama_fast.serve.server import make_served
from tests.serve.ray_cluster import ROOT, Cluster, tiny_model


def test_one_replica_answers_openais_client_and_its_process_ends_with_serve(tmp_path: Path) -> None:
    """Whole and streamed, with the text that the library gives; refusals, health, metrics; then nothing is left."""
    model = tiny_model(tmp_path / "model")
    expected = Llama.from_pretrained(model, device="cpu").generate("the cat", 9).text
    with Cluster(model=str(model), rows=2, length=256, api_key="k") as cluster:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 9, "temperature": 0}
        with OpenAI(api_key="k", base_url=f"{cluster.url}/v1", max_retries=0) as client:
            assert client.completions.create(**asked).choices[0].text == expected
            pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        assert "".join(pieces) == expected and len(pieces) > 3
        with cluster.client(headers={"authorization": "Bearer k"}) as http:
            refused = http.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"
            assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
            assert http.get("/health").json() == {"status": "ok"}
            page = http.get("/metrics").text
        with cluster.client() as stranger:
            assert stranger.post("/v1/completions", json={"prompt": "a"}).status_code == 401
        assert page.count("# TYPE llama_fast_rows gauge") == 1 and 'llama_fast_rows{replica="' in page
        assert 'llama_fast_gateway_requests_total{path="/v1/completions"' in page
        assert len(cluster.replica_processes()) == 1
        assert cluster.serve is not None
        cluster.serve.send_signal(2)
        cluster.serve.wait(60)
        assert not cluster.replica_processes()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"modell": "x"}, r"modell: unknown argument \(known: model, name, rows"),
        ({"rows": "many"}, "rows: 'many': Input should be a valid integer"),
        ({"rows": "0"}, "rows: '0': Input should be greater than or equal to 1"),
        ({"replicas": "3", "max_replicas": "2"}, "max_replicas=2 must be at least replicas=3"),
        ({"fused": "true", "compile": "true"}, "two ways to decode"),
        ({"cache": "growing"}, "unknown cache 'growing'"),
        ({"api_key": ""}, "api_key must be printable ASCII"),
        ({"timeout": "inf"}, "timeout: 'inf'"),
        ({"placement": "near"}, "placement: 'near': Input should be 'balanced' or 'prefix'"),
    ],
)
def test_arguments_that_are_wrong_are_one_line_at_rays_command_line(given: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        read({"device": "cpu", **given})
    assert isinstance(refused.value, click.ClickException) and "\n" not in str(refused.value)


def test_a_replica_has_the_words_that_it_was_given_and_never_another_device() -> None:
    found = read({"device": "cpu", "model": "random:llama-3.2-1b", "rows": "6", "encoding": "int8", "cpus": "3"})
    assert found.setup.device == "cpu" and found.setup.rows == 6 and found.setup.encoding == "int8"
    assert read({"device": "cuda", "cache": "static"}).setup.device == "cuda"


@pytest.mark.parametrize(
    ("body", "begins"),
    [
        ({"prompt": "the cat"}, "the cat"),
        ({"prompt": ["a mat", "and"]}, "a mat"),
        ({"prompt": [1, 2, 70_000]}, "\x01\x02" + chr(70_000 + 0x800)),
        ({"prompt": [[5, 6], [7]]}, "\x05\x06"),
        ({"prompt": ""}, "/v1/completions"),
        ({"prompt": [[]]}, "/v1/completions"),
        ({"prompt": 3}, "/v1/completions"),
        ([1], "/v1/completions"),
    ],
)
def test_how_a_prompt_begins_is_some_text_whatever_its_form(body: Any, begins: str) -> None:
    """Never none of it: Ray's placement divides by its length."""
    assert beginning("/v1/completions", json.dumps(body).encode()) == begins


def test_conversations_with_the_same_first_turns_begin_alike() -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    first = beginning("/", json.dumps({"messages": turns, "seed": 1}).encode())
    later = beginning("/", json.dumps({"messages": [*turns, {"role": "assistant", "content": "Hi"}]}).encode())
    assert later.startswith(first) and len(first) > 40
    assert beginning("/x", b"{not JSON") == "/x"


def test_ranks_of_two_nodes_know_their_neighbours_and_see_the_gpus_of_their_node() -> None:
    seats = [Seat("a", ("2",)), Seat("b", ("0",)), Seat("a", ("5",))]
    told = environments(seats, "10.0.0.1", 4711)
    assert [one["RANK"] for one in told] == ["0", "1", "2"]
    assert [one["LOCAL_RANK"] for one in told] == ["0", "0", "1"]
    assert [one["LOCAL_WORLD_SIZE"] for one in told] == ["2", "1", "2"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["2,5", "0", "2,5"]
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in told} == {("3", "10.0.0.1", "4711")}
    assert "CUDA_VISIBLE_DEVICES" not in environments([Seat("a", ())], "x", 1)[0]


def test_metrics_of_several_replicas_stand_on_one_page_each_under_one_heading() -> None:
    parts = []
    for name, rows in (("a", 3), ("b", 5)):
        metrics = Metrics()
        metrics.rows.set(rows)
        metrics.requests.labels("/health", "200").inc(rows)
        parts.append(labelled(metrics.registry, replica=name))
    page = Together(parts).page().decode()
    assert page.count("# HELP llama_fast_rows ") == 1
    assert 'llama_fast_rows{replica="a"} 3.0\nllama_fast_rows{replica="b"} 5.0\n' in page
    assert 'llama_fast_requests_total{path="/health",replica="b",status="200"} 5.0' in page


def test_a_gateway_counts_the_paths_that_a_server_has(llama: Llama) -> None:
    from llama_fast.engine.engine import Engine

    app = application(make_served(llama, "tiny", Engine(llama.runner, 2, 64)))
    assert {route.path for route in app.routes if hasattr(route, "path")} == PATHS


SCRIPTS = sorted((ROOT / "slurm").glob("replicas-*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize("key", [None, "secret"])
def test_a_script_has_ray_start_on_every_node_and_the_first_serve(
    script: Path, key: str | None, tmp_path: Path
) -> None:
    """With a scheduler and an environment that only say what they were asked."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(
        '#!/bin/bash\necho "srun $*"; echo "host ${RAY_SERVE_DEFAULT_HTTP_HOST:-local} ${#RAY_AUTH_TOKEN}"\n'
    )
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    (tmp_path / "bin" / "activate").write_text(f'export PATH="{tmp_path}/bin:$PATH"\n')
    told = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    told |= {"LLAMA_FAST_API_KEY": key} if key else {}
    command = ["bash", str(script), str(tmp_path), "some-model", "rows=32"]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "ray symmetric-run --address node1:20007 --min-nodes 2 --num-gpus 4" in done.stdout
    count = "replicas=2 ranks=4" if "tp" in script.stem else "replicas=8"
    assert f"-- serve run llama_fast.serve.ray:app model=some-model device=cuda {count} rows=32" in done.stdout
    assert f"host {'0.0.0.0' if key else 'local'} 64" in done.stdout
    bare = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert bare.returncode != 0 and "the path of a virtual environment" in bare.stderr
