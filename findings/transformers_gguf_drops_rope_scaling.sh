#!/usr/bin/env bash
# Date:    2026-11-28
# Package: transformers 5.24.0 reading a file of gguf 0.19.0
# Guess:   from_pretrained(gguf_file=...) of a Llama file follows the file's RoPE scaling: the keys rope.scaling.type and
#          rope.scaling.factor, and the tensor rope_freqs.weight in which Llama 3.1 files keep their "llama3" factors.
# Seen:    all of them are read past, without an error: config.rope_parameters says "default", and the logits are equal bit
#          for bit to those of the file without scaling. Biases of q, k and v are dropped the same way.
# Matters: transformers is the usual witness for a GGUF reader. For every Llama 3.1 or 3.2 file and every long-context
#          file it is a wrong witness, and an engine that is right looks wrong (or the other way about).
# Output:  rope_freqs, linear, yarn and the biases: rope_type "default" and a difference of 0.0 each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6 \
    sentencepiece==0.2.3 protobuf==7.36.2

cat > "$folder/demo.py" <<'PY'
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WIDTH, HEADS, HEAD_DIM, VOCABULARY = 32, 4, 8, 40
SHAPES = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
SHAPES |= {f"blk.0.{part}_norm": (WIDTH,) for part in ("attn", "ffn")}
SHAPES |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
SHAPES |= {"blk.0.ffn_gate": (64, WIDTH), "blk.0.ffn_up": (64, WIDTH), "blk.0.ffn_down": (WIDTH, 64)}


def write(keys=lambda writer: None, tensors=()):
    """Write one-layer Llama files that differ only by `keys` and the further `tensors`."""
    folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent))
    writer, random = gguf.GGUFWriter(folder / "model.gguf", "llama"), np.random.default_rng(0)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{i:02X}>" for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([6] * VOCABULARY)
    keys(writer)
    for name, shape in SHAPES.items():
        writer.add_tensor(name + ".weight", random.standard_normal(shape).astype(np.float32) / 2)
    for name, values in dict(tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def scaled(kind):
    def keys(writer):
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(1024)

    return keys


def read(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        return model.config.rope_parameters["rope_type"], model(torch.arange(VOCABULARY)[None]).logits


print("transformers", transformers.__version__, "torch", torch.__version__)
_, plain = read(write())
bias = np.ones(WIDTH, np.float32)
files = {
    "rope_freqs.weight": write(tensors={"rope_freqs.weight": np.array([1, 2, 4, 8], np.float32)}),
    "scaling linear": write(scaled(gguf.RopeScalingType.LINEAR)),
    "scaling yarn": write(scaled(gguf.RopeScalingType.YARN)),
    "biases of q, k, v": write(tensors={f"blk.0.attn_{part}.bias": bias for part in "qkv"}),
}
# The same weights with linear scaling, so that the size of the error is known.
model = AutoModelForCausalLM.from_pretrained(write(), gguf_file="model.gguf", dtype=torch.float32)
parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
right = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "rope_parameters": parameters, "quantization_config": None}))
right.load_state_dict(model.state_dict())
with torch.no_grad():
    error = (right.eval()(torch.arange(VOCABULARY)[None]).logits - plain).abs().max().item()
print(f"expected: other logits than the plain file's; for linear scaling they should differ by up to {error:.2f}")
assert error > 0.1
for name, folder in files.items():
    kind, logits = read(folder)
    print(f"seen: {name:18} rope_type {kind!r}, largest difference {(logits - plain).abs().max().item()}")
    assert kind == "default" and torch.equal(logits, plain), "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/demo.py" 2> "$folder/said" || { cat "$folder/said"; exit 1; }
