"""The default model against `transformers`, an independent reader of the same GGUF file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.ladder import cli
from llama_fast.recipes import optimised
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


PROMPT = [19556, 28, 957, 1462, 314]
KEPT = """
import gguf.quants, torch
from llama_fast.build import build
from llama_fast.engine.generate import generate
from llama_fast.recipes import encoding_named, optimised
from llama_ref.checkpoint import random_checkpoint
from llama_ref.config import LlamaConfig
from llama_ref.models import resolve

def peak() -> int:
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

# what the libraries load for a first generation, whatever its model, is no part of this one
small = random_checkpoint(LlamaConfig(64, 1, 2, 1, 32, 64, 99, 64))
generate(build(small, optimised(), "cpu", torch.float32), [[1, 2]], 4)
before = peak()
found = resolve("smollm2-135m")
runner = build(found.open(), optimised(encoding_named("stored")), "cpu", torch.float32)
tokens = generate(runner, [[19556, 28, 957, 1462, 314]], 12).completions[0].tokens
print((peak() - before) / found.path.stat().st_size, *tokens)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for a process's peak memory")
def test_kept_as_stored_it_takes_its_files_memory_and_says_the_same() -> None:
    """At most 1.6 times the file, all that a generation adds to the interpreter's own."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    share, *tokens = done.stdout.split()
    assert float(share) < 1.6
    runner = build(resolve(DEFAULT_MODEL).open(), optimised(), "cpu", torch.float32)
    assert list(map(int, tokens)) == list(generate(runner, [PROMPT], 12).completions[0].tokens)
