#!/usr/bin/env bash
# Date:    2026-11-29
# Package: torch 2.13.0 (oneDNN 3.12, a CPU with AVX-512)
# Guess:   a linear layer under no_grad keeps nothing between two calls: a server's memory does not depend on how many different
#          prompt lengths it has seen.
# Seen:    in bfloat16 every new number of rows keeps some 0.6 MB for good: a 1.8 MB layer that has seen 200 lengths holds over
#          100 MB more. float32 keeps 2 to 5 MB in all. The second pass over the same lengths adds nothing: it is a cache of
#          1,024 prepared products, and there are two, one inside the other: only LRU_CACHE_CAPACITY and
#          ONEDNN_PRIMITIVE_CACHE_CAPACITY together bound it.
# Matters: a process that answers prompts of many lengths grows by hundreds of MB for hours, which looks like a leak.
# Output:  200 lengths: float32 4 MB, bfloat16 145 MB, bfloat16 again 0 MB; oneDNN's cache bounded 83 to 89 MB, both bounded 2 MB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import gc
import sys

import torch


def resident_mb():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


kind = getattr(torch, sys.argv[1])
weight = torch.randn(1536, 576).to(kind)


def lengths(first, last):
    for length in range(first, last):
        torch.nn.functional.linear(torch.randn(1, length, 576).to(kind), weight)


with torch.no_grad():
    lengths(2, 12)
    before = resident_mb()
    lengths(12, 212)
    once = resident_mb()
    lengths(12, 212)
    print(f"{once - before:.0f} {resident_mb() - once:.0f}")
PY
export OMP_NUM_THREADS=1
run() { "$folder/venv/bin/python" "$folder/demo.py" "$1"; }
read -r wide _ < <(run float32)
read -r once again < <(run bfloat16)
read -r half _ < <(ONEDNN_PRIMITIVE_CACHE_CAPACITY=1 run bfloat16)
read -r bounded _ < <(ONEDNN_PRIMITIVE_CACHE_CAPACITY=1 LRU_CACHE_CAPACITY=1 run bfloat16)
"$folder/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
echo "expected: about the same of each"
echo "seen: 200 lengths: float32 $wide MB, bfloat16 $once MB, bfloat16 again $again MB; oneDNN's cache bounded $half MB, both bounded $bounded MB"
[ "$once" -gt 50 ] && [ "$wide" -lt 20 ] && [ "$again" -lt 10 ] && [ "$half" -gt 30 ] && [ "$bounded" -lt 20 ] || { echo "the behaviour has changed"; exit 1; }
