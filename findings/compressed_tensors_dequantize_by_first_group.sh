#!/usr/bin/env bash
# Date:    2026-11-28
# Package: transformers 5.24.0 with compressed-tensors 0.20.1, CompressedTensorsConfig(dequantize=True)
# Guess:   dequantize=True gives the model that the file describes, as floats: the same logits as the default loading.
# Seen:    every linear layer is decoded by the FIRST of the file's config_groups. In a file with 4 bits for attention and 8 for
#          the MLP, the MLP's 8-bit words are read as 4-bit numbers: half of them belong to other columns. No warning
#          says so. The default loading of the same file is right.
# Matters: dequantize=True is the natural reference for a reader of one's own (plain tensors, no hidden state) and is wrong
#          for mixed files, which are the usual way to spare sensitive layers.
# Output:  largest error of the logits: default 0.0, dequantize=True about 0.02 of 0.35; MLP weights off by 100 %.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 safetensors==0.8.0 \
    accelerate==1.15.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM


def packed(integers, bits):
    """Put 32 / bits unsigned numbers into each int32, the first in the lowest bits."""
    per_word = 32 // bits
    unsigned = (integers + 2 ** (bits - 1)).reshape(len(integers), -1, per_word)
    words = (unsigned << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def group(bits, target):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    return {"targets": [target], "weights": weights, "format": "pack-quantized"}


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
model = LlamaForCausalLM(config).eval()
stored, exact = {}, {}
for name, weight in model.state_dict().items():
    stored[name] = exact[name] = weight
    if "proj" in name:
        bits = 8 if "mlp" in name else 4
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        integers = (weight / scale).round().to(torch.int64)
        exact[name] = integers * scale
        del stored[name]
        stored |= {
            name + "_packed": packed(integers, bits),
            name + "_scale": scale,
            name + "_shape": torch.tensor(weight.shape),
        }
folder = Path(__file__).parent / "model"
folder.mkdir()
save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
quantization = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": group(4, "re:.*self_attn.*"), "group_1": group(8, "re:.*mlp.*")},
}
described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
(folder / "config.json").write_text(json.dumps(described))

ids = torch.arange(32)[None]
model.load_state_dict(exact)
with torch.no_grad():
    right = model(ids).logits
    default = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    by_default = (default(ids).logits - right).abs().max().item()
    dense = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    by_dequantize = (dense(ids).logits - right).abs().max().item()
print(*(f"{name} {version(name)}" for name in ("transformers", "compressed-tensors", "torch")))
print("expected: the logits of scale x integer, by both ways of loading")
print(f"seen: default loading, largest error {by_default}")
print(f"seen: dequantize=True, largest error {by_dequantize:.4f} of {right.abs().max().item():.4f}")
wrong = [name for name, weight in dense.state_dict().items() if (weight - exact[name]).abs().max() > 1e-6]
print("seen: weights that are wrong:", wrong)
assert by_default < 1e-6
assert by_dequantize > 1e-3, "the behaviour has changed"
assert len(wrong) == 3 and all("mlp" in name for name in wrong), "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py" \
    2> "$folder/said" || { cat "$folder/said"; exit 1; }
