#!/usr/bin/env bash
# Date:    2026-11-28
# Package: compressed-tensors 0.12.2 and 0.20.1, format "pack-quantized" at 3 bits
# Guess:   a file format's name stands for one layout; a reader of a later version reads what the earlier one wrote, or
#          refuses it.
# Seen:    0.12.2 puts ten 3-bit values into a 32-bit word and leaves two bits free; 0.20.1 writes a dense bit stream, in which
#          values cross the words. The name is the same and no version field tells them apart. 0.20.1's unpack_from_int32 takes
#          a row of 7 words where its own layout has 6, without a word; the first ten values are right, and most others wrong.
#          4 and 8 bits are equal in both versions, 5 and 6 bits differ in the same way.
#          (transformers refuses such a file of real size by its shapes, as "MISMATCH".)
# Matters: a reader must look at the width of weight_packed (ceil(columns / 10) or ceil(3 * columns / 32) words) to know
#          the layout; rows of up to 20 columns cannot be told apart at all.
# Output:  3 bits: 7 words and 6 words for 64 columns; the later version's reading is right at 19 of 64 columns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/pip" install -q --no-deps --target "$folder/older" compressed-tensors==0.12.2

cat > "$folder/demo.py" <<'PY'
import sys
from importlib import import_module
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file

# The same two functions moved between the versions.
MODULES = {"0.12.2": "quantized_compressors.pack_quantized", "0.20.1": "pack_quantized.helpers"}
BITS = (3, 4, 5, 8)
generator = torch.Generator().manual_seed(0)
VALUES = {
    bits: torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (1, 64), generator=generator).to(torch.int8) for bits in BITS
}

installed = version("compressed-tensors")
helpers = import_module("compressed_tensors.compressors." + MODULES[installed])
packed = {f"bits_{bits}": helpers.pack_to_int32(values, bits).contiguous() for bits, values in VALUES.items()}
if installed == "0.12.2":
    save_file(packed, sys.argv[1])
    sys.exit()
older = load_file(sys.argv[1])
print("compressed-tensors 0.12.2 (writer) and", installed, "(reader); torch", torch.__version__)
print("expected: the later version reads all 64 columns of what the older one wrote")
for bits, values in VALUES.items():
    name = f"bits_{bits}"
    back = helpers.unpack_from_int32(packed[name], bits, values.shape)
    assert torch.equal(back, values)
    read = helpers.unpack_from_int32(older[name], bits, values.shape)
    right = int((read == values).sum())
    widths = older[name].shape[1], packed[name].shape[1]
    print(f"seen: {bits} bits: {widths[0]} words then, {widths[1]} now; {right} of 64 columns right")
    if bits in (4, 8):
        assert right == 64 and widths[0] == widths[1]
    else:
        assert widths == {3: (7, 6), 5: (11, 10)}[bits], "the behaviour has changed"
        assert torch.equal(read[0, : 32 // bits], values[0, : 32 // bits]) and right < 32, "the behaviour has changed"
PY
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HOME="$folder/hf"
PYTHONPATH="$folder/older" "$folder/venv/bin/python" -W ignore "$folder/demo.py" "$folder/older.safetensors"
"$folder/venv/bin/python" -W ignore "$folder/demo.py" "$folder/older.safetensors"
