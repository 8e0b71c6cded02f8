"""The process beside: `python -m oracle.again` builds the model it is told, answers one question in JSON, and ends."""

from __future__ import annotations

import argparse
import json

import torch

from llama_fast.build import build
from llama_fast.recipes import encoding_named, fused, optimised
from llama_ref.models import resolve
from oracle.questions.checkpoints import answer
from oracle.subjects.fast import FastSubject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for word in ("model", "encoding", "device", "dtype", "ask"):
        parser.add_argument(f"--{word}", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--cache-length", type=int, required=True)
    asked = parser.parse_args()
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    encoding = encoding_named(asked.encoding)
    plan = fused(encoding) if asked.fused else optimised(encoding)
    checkpoint = resolve(asked.model).open(device, dtype, asked.adapter)
    runner = build(checkpoint, plan, device=device, dtype=dtype)
    question = json.loads(asked.ask)
    prompts = question["prompts"]
    subject = FastSubject(runner, batch=len(prompts), cache_length=asked.cache_length)
    print(json.dumps(answer(subject, prompts, question["new_tokens"])))


if __name__ == "__main__":
    main()
