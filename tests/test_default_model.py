"""The default model against `transformers`, an independent reader of the same GGUF file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.ladder import cli
from llama_ref.models import DEFAULT_MODEL, resolve
from llama_ref.tokenizers.tokenizer import DEFAULT_PROMPT

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.filterwarnings("ignore"),  # transformers warns in its own words, and they change
]


def test_sixty_greedy_tokens_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = resolve(DEFAULT_MODEL).path
    assert path is not None
    theirs: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([resolve(DEFAULT_MODEL).tokenizer().encode(DEFAULT_PROMPT)])
    with torch.no_grad():
        wanted = theirs.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    out = tmp_path / "out.json"
    flags = f"--temperature 0 --dtype float32 --max-new-tokens 60 --device cpu --json {out}"
    arguments = ["generate", "--model", DEFAULT_MODEL, "--prompt", DEFAULT_PROMPT, *flags.split()]
    monkeypatch.setattr(sys, "argv", ["llama-fast", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(out.read_text())["samples"][0]["tokens"] == wanted
