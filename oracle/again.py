"""The process beside: `python -m oracle.again` builds the model it is told, answers in JSON what it is asked, and ends.

It is asked for greedy and drawn tokens, which must be those of the process before it, and meanwhile what witnesses say of
the files.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, replace

import torch

from llama_fast.build import build
from llama_ref.models import resolve
from oracle.plans import Words
from oracle.questions.checkpoints import answer
from oracle.questions.eight_bits import without_bits
from oracle.questions.witnesses import Told, ask_witnesses
from oracle.subjects.adapters import ReadOnce
from oracle.subjects.fast import FastSubject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for word in ("model", "device", "dtype", "ask", "plan"):
        parser.add_argument(f"--{word}", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--cache-length", type=int, required=True)
    asked = parser.parse_args()
    device, dtype = torch.device(asked.device), getattr(torch, asked.dtype)
    found, question = resolve(asked.model), json.loads(asked.ask)
    checkpoint = found.open(device, dtype, asked.adapter)
    checkpoint = replace(checkpoint, weights=ReadOnce(checkpoint.weights))
    said: dict[str, object] = {}
    if question["prompts"]:
        prompts = question["prompts"]
        plan = without_bits(Words(**json.loads(asked.plan)).plan())  # as `verify` asks all but the cache itself
        runner = build(checkpoint, plan, device=device, dtype=dtype)
        subject = FastSubject(runner, batch=len(prompts), cache_length=asked.cache_length)
        said |= answer(subject, prompts, question["new_tokens"])
        del runner, subject
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = found.tokenizer() if found.has_tokenizer else None
            of_file = found.open(device, dtype) if asked.adapter else checkpoint  # whose numbers an adapter changes
            told = ask_witnesses(found.path, of_file, tokenizer)
            told.without += ["the adapter's numbers: they are read by one reader"] if asked.adapter else []
    except Exception as error:  # whatever a witness or its files raise, the tokens were told
        first = (str(error).strip().splitlines() or [""])[0]
        told = Told(
            {"witnesses that ended with an error": 1},
            {"witnesses that ended with an error": [f"{type(error).__name__}: {first}"]},
        )
    print(json.dumps({**said, "witnesses": asdict(told)}))


if __name__ == "__main__":
    main()
