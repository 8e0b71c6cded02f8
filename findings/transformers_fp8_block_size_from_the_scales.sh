#!/usr/bin/env bash
# Date:    2026-11-28
# Package: transformers 5.24.0, fine-grained fp8 (quant_method "fp8"), on a CPU
# Guess:   a block is weight_block_size of the config, [128, 128]; where a side is no multiple of 128 the last block is short.
# Seen:    on a CPU the weights are dequantised at load, by blocks of rows / (rows of the scale table). 192 rows with 2 rows of
#          scales are taken for 96 + 96 and not for 128 + 64: rows 96 to 127 get their neighbour's scale. No warning.
#          weight_block_size is not looked at; sizes that do not divide raise.
# Matters: checkpoints with heads or MLPs that are no multiple of 128 load and answer, a little wrong in every layer; as a
#          witness for a reader of one's own the result is wrong exactly at the shapes that are worth testing.
# Output:  with the scales 1 and 4: 32 of 192 rows off by the factor 4 in q_proj
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 accelerate==1.15.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

BLOCK, WIDTH = 128, 192
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=WIDTH,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=6,
    tie_word_embeddings=False,
)
stored, exact = {}, {}
for name, weight in LlamaForCausalLM(config).state_dict().items():
    stored[name] = exact[name] = weight
    if "proj" in name:
        rows, columns = weight.shape
        blocks = -(-rows // BLOCK), -(-columns // BLOCK)
        scales = torch.ones(blocks)
        scales[1:] = 4.0  # the second row of blocks, whatever its height
        stored[name] = weight.to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scales
        spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        exact[name] = stored[name].float() * spread
folder = Path(__file__).parent / "model"
folder.mkdir()
save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
(folder / "config.json").write_text(json.dumps(described))
loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()

print(*(f"{name} {version(name)}" for name in ("transformers", "torch")))
print("expected: fp8 value x scale of its block of", quantization["weight_block_size"], "in every layer")
gate, query = ("model.layers.0." + part for part in ("mlp.gate_proj.weight", "self_attn.q_proj.weight"))
wrong = (loaded[query].float() != exact[query]).any(1).nonzero().flatten().tolist()
print(f"seen: {query} {tuple(exact[query].shape)}: rows {wrong[0]} to {wrong[-1]} wrong ({len(wrong)} of {WIDTH})")
nonzero = exact[query][wrong] != 0
ratios = (loaded[query].float()[wrong][nonzero] / exact[query][wrong][nonzero]).unique().tolist()
print("seen: loaded / expected in those rows", ratios)
assert wrong == list(range(96, 128)) and ratios == [4.0], "the behaviour has changed"
# 256 rows are two whole blocks; with equal scales along the columns nothing else can go wrong there.
assert torch.equal(loaded[gate].float(), exact[gate])
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py" \
    2> "$folder/said" || { cat "$folder/said"; exit 1; }
