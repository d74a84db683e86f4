"""A real HTTP server on this machine that serves a small model's logprobs as vLLM, SGLang and llama.cpp's server do."""

from __future__ import annotations

import http.server
import json
import threading
from contextlib import contextmanager

import torch


def logprobs_of(model, tokens):
    """Return the log-probabilities of every next token, [T, V] float32, as a server computes them."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


class ServedModel:
    """Answers prompts with what `predict` says of their token ids, [T, V]; keeps the requests that came.

    `change`: edits an answer before it is sent; `raw`: answers in its stead, with a function of the handler.
    """

    def __init__(self, predict, name="small-llama"):
        self.predict, self.name = predict, name
        self.requests, self.change, self.raw = [], None, None
        self.most, self.longest = 20, 4096

    def answer(self, path, body):
        answers = {
            "/v1/models": self._models,
            "/v1/completions": self._vllm,
            "/generate": self._sglang,
            "/completion": self._llama,
        }
        return answers[path](body) if path in answers else None

    def _models(self, body):
        return {"object": "list", "data": [{"id": self.name, "object": "model", "max_model_len": self.longest}]}

    def _top(self, row, k):
        values, ids = row.topk(min(k, len(row)))
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    def _vllm(self, body):
        tokens, k = body["prompt"], body["prompt_logprobs"]
        if k > self.most:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        table, positions = self.predict(tokens), [None]
        for at, token in enumerate(tokens[1:]):
            told = dict(self._top(table[at], k))
            told.setdefault(token, float(table[at, token]))
            positions.append(
                {
                    str(i): {"logprob": v, "rank": n, "decoded_token": f"<{i}>"}
                    for n, (i, v) in enumerate(told.items(), 1)
                }
            )
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": positions}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice], "usage": usage}

    def _sglang(self, body):
        tokens, k = body["input_ids"], body["top_logprobs_num"]
        table = self.predict(tokens)
        came = [[None, tokens[0], None]]
        came += [[float(table[at, token]), token, None] for at, token in enumerate(tokens[1:])]
        top = [None, *([[v, i, None] for i, v in self._top(row, k)] for row in table[:-1])]
        meta = {"prompt_tokens": len(tokens), "input_token_logprobs": came, "input_top_logprobs": top}
        return {"text": "x", "meta_info": meta}

    def _llama(self, body):
        tokens = body["prompt"]
        top = [{"id": i, "logprob": v, "token": "x"} for i, v in self._top(self.predict(tokens)[-1], body["n_probs"])]
        probabilities = [{"id": top[0]["id"], "logprob": top[0]["logprob"], "top_logprobs": top}]
        return {"content": "x", "tokens_evaluated": len(tokens), "completion_probabilities": probabilities}


@contextmanager
def serving(served):
    """Serve on a free port of this machine; yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._respond(None)

        def do_POST(self):
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, body):
            served.requests.append((self.path, body, dict(self.headers)))
            if served.raw is not None and self.path != "/v1/models":
                served.raw(self)
                return
            answer = served.answer(self.path, body)
            status, content = answer if isinstance(answer, tuple) else (404 if answer is None else 200, answer)
            if status == 200 and served.change is not None:
                content = served.change(self.path, content)
            self.reply(status, json.dumps(content).encode())

        def reply(self, status, content, length=None):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
