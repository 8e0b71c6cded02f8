#!/usr/bin/env bash
# Date:    2026-11-29
# Package: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# Guess:   layers_to_transform limits every entry of target_modules to the layers that it lists.
# Seen:    an entry that is a module's full name is adapted whatever its layer; only names that are matched by their end
#          are limited. Nothing is said.
# Matters: a config that adds one full name to a list of short ones trains, saves and serves a layer that it excludes; a
#          reader that follows the field's words leaves that layer out and gives other logits.
# Output:  adapted: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.v_proj
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import peft
import torch
import transformers

config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
asked = peft.LoraConfig(
    r=2, target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"
)
adapted = peft.get_peft_model(model, asked)
names = sorted(
    name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
    for name, module in adapted.named_modules()
    if name.endswith(".lora_A.default")
)
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("expected: nothing of layer 0, as layers_to_transform is [1]")
print("seen: adapted", ", ".join(names))
wanted = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
assert names == wanted, "the behaviour has changed"
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py"
