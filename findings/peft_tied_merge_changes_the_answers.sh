#!/usr/bin/env bash
# Date:    2026-11-29
# Package: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# Guess:   merge_and_unload() gives a model with the answers of the adapted one, up to rounding.
# Seen:    with an adapter on the embedding of a tied model the adapted model leaves the head alone, but merging writes
#          into the table that the head shares: every logit changes. A warning speaks of "complications".
# Matters: tied models are most small Llamas, and merging is the last step before serving: what is served is not what
#          was evaluated.
# Output:  the largest difference of logits is over 10 times their size before, where an untied model differs by rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import peft
import torch
import transformers


def difference(tied):
    """(largest difference that merging makes, largest logit before)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    asked = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, asked).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = adapted(ids).logits.clone()
        after = adapted.merge_and_unload()(ids).logits
    return (after - before).abs().max().item(), before.abs().max().item()


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
(tied, size), (untied, other) = difference(True), difference(False)
print(f"expected: both differ by rounding")
print(f"seen: untied {untied:.1e} of {other:.2g}, tied {tied:.3g} of {size:.2g}")
assert untied < 1e-4 * max(1, other) and tied > 10 * size, "the behaviour has changed"
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py"
