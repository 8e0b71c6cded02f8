"""The lm-evaluation-harness: the same answers from `llama_fast` as from its own `hf` model on one checkpoint."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval, and run this file")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "42", "dogs", "run", "home"]
TASKS = {
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
        "generation_kwargs": {"until": ["a"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama and a byte-level tokenizer, saved by transformers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("checkpoint")
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], vocab_size=300, show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


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
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {
        file.name.split("_2")[0]: [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(out.rglob("samples_*.jsonl"))
    }
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    return {"samples": samples, "results": results}


def test_the_harness_finds_what_its_own_hf_model_finds(checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    theirs = evaluated("hf", checkpoint, tasks, 1, tmp_path / "hf")
    for batch in (1, 5):
        ours = evaluated("llama_fast", checkpoint, tasks, batch, tmp_path / f"fast{batch}")
        assert ours["samples"].keys() == theirs["samples"].keys() and len(ours["samples"]) == 3
        for name, samples in theirs["samples"].items():
            assert len(samples) == 24
            for one, other in zip(ours["samples"][name], samples, strict=True):
                close(one["filtered_resps"], other["filtered_resps"])
        for task, metrics in theirs["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, float) and "stderr" not in metric:
                    assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)


def close(ours: Any, theirs: Any) -> None:
    """Numbers up to rounding, everything else exactly; the harness writes numbers of its samples as text or not."""
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
        return
    try:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4, abs=1e-3)
    except ValueError:
        assert ours == theirs


def test_words_that_the_harness_uses_become_ours() -> None:
    from llama_fast.lm_eval_model import generation_options

    assert generation_options({"until": "x", "do_sample": False, "temperature": 0.7}, 9) == (
        {"stop": ["x"], "temperature": 0.0},
        9,
    )
    assert generation_options({"until": ["", "x"], "temperature": 0.7, "top_p": 0.5, "max_gen_toks": 3}, 9) == (
        {"stop": ["x"], "temperature": 0.7, "top_p": 0.5},
        3,
    )
    with pytest.raises(ValueError, match="'num_beams' is not supported"):
        generation_options({"num_beams": 4}, 9)
