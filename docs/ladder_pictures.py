"""Draw docs/ladder-*.png: `python docs/ladder_pictures.py`. That of four H200 from its `ladder.json`, the others from records.

The files that `bench` wrote of the runs on an H100 and on two CPU cores were not kept; their records hold all that a picture
shows but the bandwidth, which is the same share of the read bandwidth as the speed is of its floor. What is worked out from a
record, which is rounded, may differ from the run by a percent.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements_page import Record, records  # type: ignore[import-not-found]

from llama_fast.ladder.bench import Ladder, RungResult, Spread
from llama_fast.ladder.plots import draw, read_ladder

DOCS = Path(__file__).parent
H100 = Ladder(
    "random:llama-2-7b", "NVIDIA H100 80GB HBM3", "2.11.0+cu130", "", 0, 5, "greedy", 3098.6, None, math.nan, []
)
CPU = Ladder("smollm2-135m", "AMD EPYC, 2 threads", "2.13.0+cpu", "", 2, 5, "greedy", 52.9, None, math.nan, [])
"""The two runs, without their rungs."""


def of_record(record: Record, run: Ladder, dtype: str, prompt_tokens: int) -> Ladder:
    """A run's ladder with the rungs that its record tells; what neither tells is not a number."""
    for line in record.values.strip().splitlines()[1:]:
        row = line.split("|")[1].strip()
        rate = Spread(*(float(x) for x in re.findall(r"[\d.]+", record.cell(row, "tokens/s").replace(",", ""))))
        floor = float(record.cell(row, "floor").replace(",", ""))
        run.rungs.append(
            RungResult(
                name=row.split()[0],
                does=row,
                plan="",
                dtype=dtype,
                batch=1,
                prompt_tokens=prompt_tokens,
                new_tokens=200,
                cache_length=0,
                tokens_per_second=rate,
                decode_tokens_per_second=math.nan,
                time_to_first_token_ms=float(record.cell(row, "first token").split()[0]),
                bandwidth_gb_per_s=run.read_bandwidth_gb_per_s * rate.median / floor,
                mbu=rate.median / floor,
                peak_memory_gb=float(record.cell(row, "memory").split()[0]),
                weights_gb=math.nan,
                compile_seconds=math.nan,
                floor_tokens_per_second=floor,
                verdict=record.cell(row, "oracle"),
            )
        )
    return run


def ladders() -> dict[str, Ladder]:
    """The ladder of each picture, by the name of its file."""
    found = {record.name: record for record in records()}
    return {
        "ladder-4xh200": read_ladder(DOCS / "ladder-4xh200.json"),
        "ladder-h100": of_record(found["h100-ladder"], H100, "bfloat16", 6),
        "ladder-cpu": of_record(found["cpu-ladder"], CPU, "float32", 5),
    }


if __name__ == "__main__":
    for name, ladder in ladders().items():
        draw(ladder, DOCS / f"{name}.png")
