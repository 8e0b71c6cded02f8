#!/usr/bin/env bash
# Date:    2026-11-28
# Package: huggingface_hub 2.4.0 (InferenceClient) over httpx2 2.16.2; beside them openai 3.57.0 and requests 2.34.2
# Guess:   in a text/event-stream a line ends at CR, LF or CRLF only, and JSON may hold U+2028 or U+0085 as they are. So every
#          client reads an event whose text holds one of them.
# Seen:    Response.iter_lines of httpx2 ends lines wherever str.splitlines does, also at U+2028, U+2029 and U+0085. The Hub's
#          client reads the stream by it, gets half a JSON document, and the generation fails with JSONDecodeError.
#          openai's client reads the very same bytes; so does requests' iter_lines.
# Matters: the model decides whether the client fails: one such character in an answer is enough (they stand in text that
#          was copied from web pages). A server should write them as \u2028; a client of one's own must not use iter_lines.
# Output:  openai 'one\u2028two', InferenceClient JSONDecodeError, httpx2 2 lines, requests 1 line
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0 httpx2==2.16.2 openai==3.57.0 requests==2.34.2

cat > "$folder/demo.py" <<'PY'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import huggingface_hub
import openai
import requests

TEXT = "one\u2028two"


def chunk(delta, finish_reason):
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


EVENTS = [chunk({"role": "assistant", "content": TEXT}, None), chunk({}, "stop")]
STREAM = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in EVENTS) + "data: [DONE]\n\n"
LINE = json.dumps({"text": TEXT}, ensure_ascii=False) + "\n"


class Server(BaseHTTPRequestHandler):
    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.answer(LINE, "application/x-ndjson")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(STREAM, "text/event-stream")

    def log_message(self, *words):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"
asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True}


def content(stream):
    return "".join(part.choices[0].delta.content or "" for part in stream)


print("huggingface_hub", huggingface_hub.__version__, "httpx2", httpx2.__version__)
print("openai", openai.__version__, "requests", requests.__version__)
print(f"expected from both clients: {TEXT!r}; from both iter_lines: 1 line")
by_openai = content(openai.OpenAI(base_url=address + "/v1", api_key="none").chat.completions.create(**asked))
print(f"seen: openai {by_openai!r}")
hub_client = huggingface_hub.InferenceClient(base_url=address + "/v1", api_key="none")
try:
    by_hub = content(hub_client.chat_completion(**asked))
except json.JSONDecodeError as error:
    by_hub = f"JSONDecodeError: {error}"
print(f"seen: InferenceClient {by_hub!r}")
with httpx2.stream("GET", address) as response:
    httpx2_lines = list(response.iter_lines())
requests_lines = list(requests.get(address, stream=True, timeout=10).iter_lines())
print(f"seen: httpx2 {len(httpx2_lines)} lines {httpx2_lines}, requests {len(requests_lines)} line")
server.shutdown()
assert by_openai == TEXT
assert by_hub.startswith("JSONDecodeError"), "the behaviour has changed"
assert len(httpx2_lines) == 2 and len(requests_lines) == 1, "the behaviour has changed"
PY
HF_HOME="$folder/hf" "$folder/venv/bin/python" "$folder/demo.py"
