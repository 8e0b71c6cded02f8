#!/usr/bin/env bash
# Date:    2026-11-29
# Package: ray 2.60.0 (Ray Serve, deployments called through a handle with stream=True)
# Guess:   a streaming answer that is cancelled, by `response.cancel()` or because the HTTP client behind it has left, stops being
#          made: Ray iterates over the replica's generator itself, item by item, and knows of the cancellation.
# Seen:    an async generator is stopped at its next `await`. A plain generator runs to its end: the reader took one item and
#          cancelled, and the replica goes on to make all 40, four seconds long. It is the same behind an ingress whose HTTP client
#          leaves.
# Matters: an engine's own API is most often a plain generator. Behind Ray Serve each client that leaves then costs its whole answer:
#          the GPU computes tokens for nobody. Tests with clients that read to the end see nothing.
# Output:  async generator 1 of 40, plain generator 40 of 40
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'ray[serve]==2.60.0'

cat > "$folder/demo.py" <<'PY'
import logging
import time

import ray
from ray import serve

ITEMS, PAUSE = 40, 0.1


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Engine:
    def __init__(self):
        self.made = {"async": 0, "plain": 0}

    async def async_tokens(self):
        import asyncio

        for number in range(ITEMS):
            self.made["async"] += 1
            yield number
            await asyncio.sleep(PAUSE)

    def plain_tokens(self):
        for number in range(ITEMS):
            self.made["plain"] += 1
            yield number
            time.sleep(PAUSE)

    async def how_many(self):
        return dict(self.made)


ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False, logging_level=logging.ERROR)
serve.start(proxy_location="Disabled")
engine = serve.run(Engine.bind())
streaming = engine.options(stream=True)
for method in (streaming.async_tokens, streaming.plain_tokens):
    response = method.remote()
    assert next(response) == 0
    response.cancel()
time.sleep(ITEMS * PAUSE + 3)
made = engine.how_many.remote().result()
print("ray", ray.__version__)
print("expected after the reader took one item and cancelled: a few items made of either")
print(f"seen: async generator {made['async']} of {ITEMS}, plain generator {made['plain']} of {ITEMS}")
serve.shutdown()
ray.shutdown()
assert made["async"] < ITEMS / 2 and made["plain"] == ITEMS, "the behaviour has changed"
PY
HOME="$folder" RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" -W ignore "$folder/demo.py"
