#!/usr/bin/env bash
# Date:    2026-11-28
# Package: lm_eval 0.4.13 (multiple choice tasks), transformers 5.24.0, torch 2.13.0
# Guess:   a model whose logits are NaN (an overflow in float16, a zero scale) fails the evaluation, scores 0, or NaN.
# Seen:    acc and acc_norm take numpy's argmax, which stops at the first NaN: every question counts as answered with the
#          first choice. The broken model gets the share of questions whose answer is A, without a warning, and here beats
#          the sound model. Perplexity tasks do show nan.
# Matters: the damage of a quantised format is often judged by such a score alone; 25 to 30 % looks like a weak model,
#          not like a broken one.
# Output:  sound model 0.3 and 0.6, the same model with NaN 0.7 and 0.7, on questions of which 7 of 10 have the answer A.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import json
from importlib.metadata import version
from pathlib import Path

import lm_eval
import lm_eval.tasks
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path(__file__).parent / "task"
folder.mkdir()
questions = [{"question": f"Question {i}:", "answer": 0 if i < 7 else 1} for i in range(10)]
(folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
(folder / "task.yaml").write_text(f"""
task: four_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [orange, red, blue, grey]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""")
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = {letter: i + 2 for i, letter in enumerate(sorted(byte_level.alphabet()))}
letters = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | alphabet, merges=[]))
letters.pre_tokenizer, letters.decoder = byte_level, decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="</s>")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)


def evaluated():
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    result = lm_eval.simple_evaluate(harness, tasks=["four_choices"], task_manager=manager, bootstrap_iters=0)
    return tuple(result["results"]["four_choices"][f"{name},none"] for name in ("acc", "acc_norm"))


print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "torch")))
sound = evaluated()
with torch.no_grad():
    model.lm_head.weight[3] = float("nan")  # one bad row: every softmax is NaN
    assert bool(model(torch.tensor([[5, 6]])).logits.log_softmax(-1).isnan().all())
broken = evaluated()
print("seen: sound model acc, acc_norm", sound)
print("expected: an error, 0 or nan for the model of NaN logits")
print("seen: model of NaN logits acc, acc_norm", broken, "(the share of questions whose answer is the first choice: 0.7)")
assert max(sound) < 0.7
assert broken == (0.7, 0.7), "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" XDG_CACHE_HOME="$folder/cache" OMP_NUM_THREADS=1 \
    "$folder/venv/bin/python" "$folder/demo.py" 2> "$folder/said" || { cat "$folder/said"; exit 1; }
