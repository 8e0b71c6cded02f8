#!/usr/bin/env bash
# Date:    2026-11-29
# Package: gptqmodel 7.7.0, checkpoint_format "gptq" (v1), 4 bits, asymmetric
# Guess:   a package reads its own files one way: loading a model, and its dequantize_model, give the matrix that was saved.
# Seen:    v1 stores zero points less one. Saving subtracts 0x11111111 from each packed word, so a zero point of 0 borrows from its
#          neighbour; loading adds 0x11111111 to the word, which gives it back. dequantize_model adds 1 to each field alone: the
#          neighbour stays one too small, and its whole group is one step off. (3 bits are done by fields in both; 2, 4 and 8 by
#          words in one and by fields in the other.)
# Matters: a group without negative weights has the zero point 0, so real asymmetric files hold such words. A reader of one's own
#          has to choose; adding to the word is what the saver undoes. Format "gptq_v2" stores zero points as they are.
# Output:  loaded: 0 rows differ; dequantize_model: row 1, whose neighbour has the zero point 0, is off by one step
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6 \
    pillow==13.0.0 requests==2.34.2
# gptqmodel asks for a newer torch, and for more packages that these functions do not use: its source runs as it is.
"$folder/venv/bin/pip" install -q --no-deps torchao==0.18.0 pypcre==0.6.4 device-smi==0.5.7 tokenicer==0.0.14 logbar==0.4.15 \
    threadpoolctl==3.8.0 defuser==0.0.28
"$folder/venv/bin/pip" download -q --no-deps --no-binary gptqmodel --no-build-isolation -d "$folder" gptqmodel==7.7.0
tar xf "$folder/gptqmodel-7.7.0.tar.gz" -C "$folder"

cat > "$folder/demo.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear import PackableQuantLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from gptqmodel.utils.model_dequant import dequantize_model
from safetensors.torch import load_file, save_file

OUT, IN, BITS = 32, 32, 4


class Settings:
    bits, pack_dtype, format = BITS, torch.int32, "gptq"


def decoded(module):
    return PackableQuantLinear.dequantize_weight(module).t().float()


torch.manual_seed(0)
zero = torch.full((OUT, 1), 8.0)
zero[0] = 0  # a row without negative weights: asymmetric quantisation gives it a zero point of 0
scale = torch.full((OUT, 1), 0.125)
linear = torch.nn.Linear(IN, OUT, bias=False)
linear.weight.data = (torch.randint(0, 16, (OUT, IN)) - zero) * scale
module = TorchLinear(bits=BITS, group_size=IN, sym=False, desc_act=False, in_features=IN, out_features=OUT)
module.pack_original(linear, scale, zero, torch.zeros(IN, dtype=torch.int32))
module.enable_wf_unsqueeze = True
module._init_wf_unsqueeze_buffers()
assert torch.equal(decoded(module), linear.weight.data)
convert_gptq_v2_to_v1_format_module(module, Settings())  # as gptqmodel does when it saves checkpoint_format "gptq"

folder = Path(sys.argv[1])
folder.mkdir()
name = "model.layers.0.mlp.up_proj"
parts = {f"{name}.{part}": getattr(module, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
stated = {"quant_method": "gptq", "bits": BITS, "group_size": IN, "sym": False, "desc_act": False}
described = {"model_type": "llama", "quantization_config": stated | {"checkpoint_format": "gptq", "pack_dtype": "int32"}}
(folder / "config.json").write_text(json.dumps(described))

convert_gptq_v1_to_v2_format_module(module, BITS, torch.int32)  # as it does when it loads the file
loaded = decoded(module)
dequantize_model(folder, Path(sys.argv[2]), target_dtype=torch.float32)
(file,) = Path(sys.argv[2]).glob("*.safetensors")
written = load_file(file)[f"{name}.weight"].float()
print("gptqmodel 7.7.0, torch", torch.__version__)
print("expected: loading a file and dequantising it by the tool's own function give the matrix that was saved")
for told, matrix in (("loaded", loaded), ("dequantize_model", written)):
    rows = (matrix != linear.weight.data).any(1).nonzero().flatten().tolist()
    print(f"seen: {told}: {len(rows)} rows differ from what was saved {rows}")
step = ((written - linear.weight.data)[1] / 0.125).unique().tolist()
print("seen: row 1, whose neighbour has the zero point 0, is off by", step, "steps")
assert torch.equal(loaded, linear.weight.data), "the behaviour has changed"
assert (written != linear.weight.data).any(1).nonzero().flatten().tolist() == [1] and step == [1.0], "the behaviour has changed"
PY
PYTHONPATH="$folder/gptqmodel-7.7.0" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" \
    "$folder/venv/bin/python" -W ignore "$folder/demo.py" "$folder/model" "$folder/dequantised" > "$folder/said" 2>&1 ||
    { cat "$folder/said"; exit 1; }
grep -E "gptqmodel 7|expected:|seen:" "$folder/said" | sed 's/.*\(gptqmodel 7\|expected:\|seen:\)/\1/'
