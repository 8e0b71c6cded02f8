#!/usr/bin/env bash
# Date:    2026-11-28
# Package: transformers 5.24.0 (Llama with rope_type "dynamic")
# Guess:   a forward pass without a cache is a function of its input: asking twice gives the same logits, whatever other
#          prompts the model has seen in between.
# Seen:    the module keeps the RoPE frequencies of the longest prompt so far. A prompt longer than the original context,
#          but shorter than an earlier one, is computed with the earlier one's frequencies. A prompt that fits the original
#          context resets them. So the logits depend on the order in which prompts arrive; rows of one batch do too.
# Matters: perplexities differ with the order of documents, a served model answers by its history, and a comparison with
#          another engine passes or fails by what ran before.
# Output:  difference 0.0 on a fresh model, about 5.6 after a long prompt, 0.0 again after a short one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    initializer_range=0.2,
)
model = LlamaForCausalLM(config).eval()
prompt, longer, short = (torch.randint(0, 128, (1, length)) for length in (48, 100, 20))


@torch.no_grad()
def logits(ids):
    return model(ids, use_cache=False).logits


print("transformers", transformers.__version__, "torch", torch.__version__)
first = logits(prompt)
again = (logits(prompt) - first).abs().max().item()
logits(longer)
after_longer = (logits(prompt) - first).abs().max().item()
logits(short)
after_short = (logits(prompt) - first).abs().max().item()
print("expected: the same prompt of 48 tokens gives the same logits at every time")
print("seen: asked again at once          ", again)
print("seen: after a prompt of 100 tokens ", after_longer, "of", first.abs().max().item())
print("seen: after a prompt of 20 tokens  ", after_short)
assert again == 0.0 and after_short == 0.0
assert after_longer > 1.0, "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/demo.py"
