#!/usr/bin/env bash
# Date:    2026-11-28
# Package: torchao 0.18.0 (Float8WeightOnlyConfig, Int8WeightOnlyConfig), torch 2.13.0
# Guess:   a weight row of zeros stays zero in every weight-only format; its scale is anything but 0/0.
# Seen:    float8 weight-only gives that row the scale 0 and NaN as values: the layer's output is NaN in that column.
#          int8 weight-only of the same layer is right. The conversion itself says nothing.
# Matters: zero rows are ordinary: pruned neurons, and vocabularies padded to a multiple of 64, whose lm_head rows are
#          zeros. One of them makes the softmax over the whole vocabulary NaN.
# Output:  int8 0.0, float8 nan; the softmax over the padded vocabulary holds 8 of 8 NaN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import torch
import torchao
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_


def head(config):
    """A layer of 8 outputs whose last row is padding, quantised with `config`."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        layer.weight[7] = 0.0
    quantize_(layer, config)
    return layer


print("torch", torch.__version__, "torchao", torchao.__version__)
x = torch.ones(1, 16)
int8, float8 = head(Int8WeightOnlyConfig()), head(Float8WeightOnlyConfig())
print("expected: output 7 is 0 in both, and the softmax is finite")
print("seen: int8   ", int8(x)[0, 7].item())
print("seen: float8 ", float8(x)[0, 7].item(), "with the scale", float8.weight.scale[7].item())
probabilities = float8(x).softmax(-1)
print("seen: float8 softmax, NaN in", int(probabilities.isnan().sum()), "of", probabilities.numel())
assert int8(x)[0, 7].item() == 0.0
assert float8.weight.scale[7].item() == 0.0 and bool(float8(x)[0, 7].isnan()), "the behaviour has changed"
assert bool(float8(x)[0, :7].isfinite().all()) and bool(probabilities.isnan().all())
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py"
