"""The face: text in, text out, alone and in batches."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from llama_fast import Llama, Plan
from llama_fast.encodings.int8 import Int8
from llama_ref.checkpoint import Checkpoint, save_checkpoint
from llama_ref.tokenizers.tokenizer import RandomTokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def directory(untied: Checkpoint, tmp_path: Path) -> Path:
    tokenizer = RandomTokenizer(untied.config.vocab_size, None, ())
    save_checkpoint(tmp_path / "model", untied.config, dict(untied.weights), tokenizer=tokenizer)
    return tmp_path / "model"


def test_batches_answer_as_rows_do_alone(directory: Path) -> None:
    llama = Llama.from_pretrained(directory, device="cpu")
    texts = ["one", "another text", "3"]
    together = llama.generate(texts, 9)
    assert [output.text for output in together] == [llama.generate(text, 9).text for text in texts]
    assert [output.prompt_tokens for output in together] == [3, 12, 1]
    assert all(output.text.split() == [str(token) for token in output.tokens] for output in together)


def test_the_stream_joins_to_the_text(directory: Path) -> None:
    llama = Llama.from_pretrained(directory, Plan(Int8()), device="cpu")
    output = llama.generate("some text", 12, temperature=0.9, seed=4)
    assert "".join(llama.stream("some text", 12, temperature=0.9, seed=4)) == output.text
    told: list[str] = []
    llama.generate("some text", 12, temperature=0.9, seed=4, on_text=lambda row, piece: told.append(piece))
    assert "".join(told) == output.text


def test_a_stop_string_ends_one_row_and_not_the_other(directory: Path) -> None:
    llama = Llama.from_pretrained(directory, device="cpu")
    free = llama.generate(["ab", "xyz"], 12)
    word = f" {free[0].tokens[5]} "
    assert word not in free[1].text
    first, second = llama.generate(["ab", "xyz"], 12, stop=[word])
    assert first.text == free[0].text[: free[0].text.find(word)] and first.finish_reason == "stop"
    assert second.text == free[1].text and second.finish_reason == "length"


def test_scores_are_log_probabilities_of_the_text(directory: Path) -> None:
    llama = Llama.from_pretrained(directory, device="cpu")
    texts = ["hello there", "hm"]
    scores = llama.score(texts)
    assert [len(row) for row in scores] == [10, 1]
    ids = torch.tensor([llama.tokenizer.encode(texts[0])])
    logprobs = llama.runner.score(ids)[0].double().log_softmax(-1)
    assert math.isclose(sum(scores[0]), float(sum(logprobs[i, ids[0, i + 1]] for i in range(10))), rel_tol=1e-5)


def test_a_row_may_be_one_longer_than_the_context_to_be_scored(directory: Path) -> None:
    """Its last token is asked for, and never read; one alone is asked for nothing."""
    llama = Llama.from_pretrained(directory, device="cpu")
    context = llama.runner.config.max_context
    rows = [[(7 * i) % 101 for i in range(context + 1)], [3, 5, 8], [4]]
    scores = llama.score_ids(rows)
    assert [len(score.logprobs) for score in scores] == [context, 2, 0]
    logprobs = llama.runner.score(torch.tensor([rows[0][:-1]]))[0].double().log_softmax(-1)
    expected = [float(logprobs[i, rows[0][i + 1]]) for i in range(context)]
    assert scores[0].logprobs == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=f"exceed the model's context of {context}"):
        llama.score_ids([[1] * (context + 2)])
    with pytest.raises(ValueError, match="token id 101 is outside the vocabulary of 101"):
        llama.score_ids([[1, 2, 101]])


def test_the_cache_is_kept_between_calls(directory: Path) -> None:
    llama = Llama.from_pretrained(directory, device="cpu")
    llama.generate("abc", 5)
    first = llama.cache_length(1)
    llama.generate("another", 5)
    assert llama.cache_length(1) == first is not None


def test_the_readmes_example_runs(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python block of README.md, word for word, on a small model in place of the default one."""
    block = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    assert block is not None and "from_pretrained" in block[1]
    original = Llama.from_pretrained.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Llama, "from_pretrained", classmethod(lambda cls, model, **kw: original(cls, directory, **kw)))
    exec(compile(block[1], "README.md", "exec"), {})
    assert capsys.readouterr().out
