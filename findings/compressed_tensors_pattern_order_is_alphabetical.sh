#!/usr/bin/env bash
# Date:    2026-11-29
# Package: compressed-tensors 0.20.1, config_groups with patterns ("re:...") as targets
# Guess:   where patterns of two groups match a module, the order of the groups in the file decides ("return the first scheme ...
#          the order of target_to_scheme matters", says the code), or the narrower pattern, or the case is refused.
# Seen:    match_targets sorts the targets by their text, so the alphabetically first pattern wins. The order of the groups is
#          without effect, and the same pattern spelled with needless brackets gives a layer another number of bits.
# Matters: who writes a file (the tool that quantises) and who reads it (the loader) use this function, so a file is read as it was
#          written; but what was asked for ("q_proj in 8 bits, the rest of attention in 4") is not what is done, and no message
#          says so. A reader of one's own that goes by the file's order unpacks 4-bit words as 8-bit ones.
# Output:  q_proj gets 4 bits as re:.*q_proj$ and 8 bits as re:(.*)q_proj$, whichever group comes first
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config


def bits_of_each(groups):
    """Module -> its number of bits under config_groups of (pattern, bits), in this order."""
    attention = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in ("q_proj", "o_proj")})
    model = torch.nn.ModuleDict({"self_attn": attention})
    schemes = {f"group_{i}": {"targets": [pattern], "weights": {"num_bits": bits}} for i, (pattern, bits) in enumerate(groups)}
    apply_quantization_config(model, QuantizationConfig(config_groups=schemes, format="pack-quantized"))
    return {name: layer.quantization_scheme.weights.num_bits for name, layer in attention.items()}


print(*(f"{name} {version(name)}" for name in ("compressed-tensors", "torch")))
print("expected: the group that comes first decides, however its pattern is spelled")
found = {}
for narrow in ("re:.*q_proj$", "re:(.*)q_proj$"):
    for groups in ([(narrow, 8), ("re:.*attn.*", 4)], [("re:.*attn.*", 4), (narrow, 8)]):
        found[narrow, groups[0][1]] = bits_of_each(groups)
        print("seen:", " before ".join(f"{pattern} ({bits} bits)" for pattern, bits in groups), "->", found[narrow, groups[0][1]])
for (narrow, _first), bits in found.items():
    assert bits == {"q_proj": 8 if "(" in narrow else 4, "o_proj": 4}, "the behaviour has changed"
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" "$folder/venv/bin/python" -W ignore "$folder/demo.py" \
    2> "$folder/said" || { cat "$folder/said"; exit 1; }
