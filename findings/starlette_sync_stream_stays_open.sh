#!/usr/bin/env bash
# Date:    2026-11-28
# Package: starlette 1.10.0 (StreamingResponse) under uvicorn 0.54.0
# Guess:   when the client leaves, the server ends the stream and closes the generator behind it, so that its `finally` runs:
#          there the engine frees the request's cache and its place in the batch.
# Seen:    an async generator is closed at once. A plain generator is dropped and not closed: its `finally` has not run
#          seconds later, and runs only when Python's cycle collector comes by (the script holds the collector back, so that
#          every run shows the same; in a server the moment depends on how many objects other requests make).
# Matters: a server that streams from a plain generator (the form that most engines' own API gives) leaks one slot of its batch
#          for each client that leaves, until it refuses everyone; tests with clients that read to the end see nothing.
# Output:  2 s after the client left: async closed, plain NOT closed; after gc.collect(): closed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q starlette==1.10.0 uvicorn==0.54.0

cat > "$folder/demo.py" <<'PY'
import asyncio
import gc
import http.client
import threading
import time
from importlib.metadata import version

import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

closed = {}


def plain_tokens():
    try:
        while True:
            time.sleep(0.05)
            yield b"token "
    finally:
        closed["plain"] = True


async def async_tokens():
    try:
        while True:
            await asyncio.sleep(0.05)
            yield b"token "
    finally:
        closed["async"] = True


async def plain(request):
    return StreamingResponse(plain_tokens())


async def asynchronous(request):
    return StreamingResponse(async_tokens())


app = Starlette(routes=[Route("/plain", plain), Route("/async", asynchronous)])
server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    time.sleep(0.05)
port = server.servers[0].sockets[0].getsockname()[1]


def leave_early(path):
    """Read the first token of an endless answer and hang up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.read(6) == b"token "
    response.close()
    connection.close()


print("starlette", version("starlette"), "uvicorn", version("uvicorn"))
gc.disable()  # so that the collector's moment is ours and the result is the same in every run
for path in ("/async", "/plain"):
    leave_early(path)
time.sleep(2)
print("expected 2 s after the client left: both generators closed")
print(f"seen: async generator closed: {closed.get('async', False)}, plain generator closed: {closed.get('plain', False)}")
assert closed.get("async") and not closed.get("plain"), "the behaviour has changed"
gc.collect()
time.sleep(0.5)
print(f"seen after gc.collect(): plain generator closed: {closed.get('plain', False)}")
assert closed.get("plain")
server.should_exit = True
PY
"$folder/venv/bin/python" "$folder/demo.py"
