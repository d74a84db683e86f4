"""Asking a served model for the logprobs of a prompt: what they say is read, what they get wrong is told."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from pytest_qsa.common.errors import InfraError, QsaError
from pytest_qsa.external import served_client
from pytest_qsa.external.logprobs import read_logprobs
from pytest_qsa.external.served_client import Client
from pytest_qsa.suite import Served
from support.served_models import ServedModel, serving

TOKENS = [3, 11, 7, 7, 29, 0]
VOCABULARY = 40


def predict(tokens):
    """Predict from the last token alone; the same rows whatever stands before it."""
    rows = [torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(token)) * 3 for token in tokens]
    return torch.stack(rows).log_softmax(-1)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(served_client, "SECOND_TRY_AFTER", 0.0)
    return ServedModel(predict, name="m")


@pytest.fixture
def url(model):
    with serving(model) as address:
        yield f"{address}/v1"


def asked(url, tokens=TOKENS, **keys):
    return Client.connect(Served(url=url, **keys)).table(tokens, 0)


@pytest.mark.parametrize("api", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("root", ["/v1", "/v1/", ""], ids=["v1", "slash", "bare"])
def test_each_kind_of_server_tells_the_same_table(url, api, root):
    table = asked(url.removesuffix("/v1") + root, api=api, top_logprobs=VOCABULARY // 2)
    truth = predict(TOKENS)[:-1].double().numpy()
    np.testing.assert_array_equal(table.tokens, TOKENS)
    top = table.ids[:, : VOCABULARY // 2]
    np.testing.assert_array_equal(top, np.argsort(-truth, axis=1, kind="stable")[:, : VOCABULARY // 2])
    np.testing.assert_allclose(table.logprobs[:, :20], np.take_along_axis(truth, top, axis=1), atol=1e-6)
    came = truth[np.arange(5), TOKENS[1:]]
    known = ~np.isnan(table.came)
    assert known.all() == (api != "llama.cpp")
    np.testing.assert_allclose(table.came[known], came[known], atol=1e-6)


def test_a_prompt_is_sent_as_its_ids_and_the_key_only_as_a_header(url, model, monkeypatch):
    monkeypatch.setenv("QSA_KEY", "sesame-0123")
    asked(url, api_key_env="QSA_KEY", top_logprobs=5)
    (_, _, headers), (path, body, more) = model.requests
    assert path == "/v1/completions"
    assert body["prompt"] == TOKENS
    assert body["prompt_logprobs"] == 5
    assert headers["Authorization"] == more["Authorization"] == "Bearer sesame-0123"
    assert "sesame" not in json.dumps(body)


def test_no_proxy_of_the_environment_is_used(url, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert len(asked(url).ids) == 5


def answers(status, content=b"{}", length=None):
    def raw(handler):
        handler.reply(status, content, length)
        handler.close_connection = True

    return raw


def redirect(handler):
    handler.send_response(307)
    handler.send_header("Location", "http://127.0.0.1:1/elsewhere")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def nothing(handler):
    handler.close_connection = True


def broken_chunks(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"10\r\n{")
    handler.close_connection = True


@pytest.mark.parametrize(
    ("raw", "said", "times"),
    [
        (answers(500, b'{"error": {"message": "CUDA\\nfailed"}}'), "answered 500: CUDA failed (tried twice)", 2),
        (answers(503, b"<html>"), "answered 503 (tried twice)", 2),
        (answers(200, b'{"choices": [', 400), "the answer broke off (tried twice)", 2),
        (broken_chunks, "the answer broke off (tried twice)", 2),
        (nothing, "(tried twice)", 2),
        (answers(200, b"<html>login</html>"), "no JSON in the answer: '<html>login</html>'", 1),
        (answers(200, b""), "no JSON in the answer: ''", 1),
        (answers(200, b"[]"), "the answer is no object", 1),
        (answers(401, b'{"error": "Unauthorized"}'), "answered 401: Unauthorized", 1),
        (answers(404), "there is no /v1/completions: is it a server of the kind 'vllm'?", 1),
        (redirect, "answered 307, a redirect, which is not followed: write the address itself", 1),
    ],
    ids=["500", "503", "half", "half chunked", "nothing", "html", "empty", "list", "401", "404", "redirect"],
)  # fmt: skip
def test_a_server_that_fails_is_told_in_one_line(url, model, raw, said, times):
    model.raw = raw
    with pytest.raises(InfraError) as error:
        asked(url)
    assert str(error.value).startswith(url.removesuffix("/v1")[:16])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(model.requests) == 1 + times


def test_a_second_try_may_help(url, model):
    def first(handler):
        model.raw = None
        answers(503)(handler)

    model.raw = first
    assert len(asked(url).ids) == 5


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
def test_a_server_that_never_ends_is_left_after_its_time(url, model, drip):
    def raw(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(100 if drip else 0):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.02)
        time.sleep(0.0 if drip else 1.0)

    model.raw = raw
    started = time.monotonic()
    with pytest.raises(InfraError, match=r"no answer in 0\.3 s"):
        asked(url, timeout=0.3)
    assert time.monotonic() - started < 1.0


def test_nobody_there_is_told(monkeypatch):
    monkeypatch.setattr(served_client, "SECOND_TRY_AFTER", 0.0)
    with pytest.raises(InfraError, match=r"http://127\.0\.0\.1:1/v1/models: .*refused \(tried twice\)"):
        asked("http://127.0.0.1:1/v1")


def test_a_key_is_not_printed_even_where_the_server_says_it(url, model, monkeypatch):
    monkeypatch.setenv("QSA_KEY", "sesame-0123")
    model.raw = answers(401, b'{"error": "no such key: sesame-0123"}')
    with pytest.raises(InfraError) as error:
        asked(url, api_key_env="QSA_KEY")
    assert "sesame" not in str(error.value)
    assert "no such key" in str(error.value)


def test_a_variable_that_is_not_set_is_named(url, monkeypatch):
    monkeypatch.delenv("QSA_KEY", raising=False)
    with pytest.raises(InfraError, match="the environment variable QSA_KEY is not set"):
        asked(url, api_key_env="QSA_KEY")


def first_choice(**keys):
    def change(path, content):
        if path == "/v1/completions":
            content["choices"][0] |= keys
        return content

    return change


def whole(**keys):
    return lambda path, content: content | keys if path != "/v1/models" else content


def without_a_token(path, content):
    if path == "/v1/completions":
        content["choices"][0]["prompt_logprobs"][2].pop(str(TOKENS[2]))
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (first_choice(prompt_logprobs=None), "the answer has no prompt_logprobs"),
        (first_choice(prompt_logprobs=[None, {}, {}]), "6 tokens were sent, the answer is about 6"),
        (whole(usage={"prompt_tokens": 7}), "6 tokens were sent, the answer is about 7"),
        (whole(model="another"), "the answer is of the model 'another', not 'm'"),
        (whole(choices=[]), "the answer has no prompt_logprobs"),
        (without_a_token, "the token 7 at position 2 is not in the answer"),
        (first_choice(prompt_logprobs=[None] * 6), "position 1: there are no logprobs"),
        (first_choice(prompt_logprobs=[None] + [{"x": 1}] * 5), "position 1: the logprobs are no mapping of token ids"),
        (first_choice(prompt_logprobs=[{}] * 6), "prompt_logprobs is a list that begins with null"),
        (lambda path, content: {"data": []} if path == "/v1/models" else content, "say which model is meant"),
        (lambda path, content: {"oops": 1} if path == "/v1/models" else content, "lists no models"),
    ],
)  # fmt: skip
def test_an_answer_about_something_else_is_told(url, model, change, said):
    model.change = change
    with pytest.raises(QsaError) as error:
        asked(url)
    assert said in str(error.value)


def test_a_model_that_is_not_served_is_told_with_those_that_are(url):
    with pytest.raises(InfraError, match="'n' is not served; there are m"):
        asked(url, model="n")


def test_more_logprobs_or_tokens_than_the_server_gives_are_told(url, model):
    with pytest.raises(InfraError, match="answered 400: Requested prompt logprobs of 30, which is greater than max"):
        asked(url, top_logprobs=30)
    model.longest = 6
    with pytest.raises(InfraError, match="takes 6 tokens and a sample has 6 and one more: lower data"):
        asked(url)


def test_a_file_holds_what_a_server_said(tmp_path, url):
    positions = [None, {"11": {"logprob": -0.5}, "4": -1.0}, {"7": -0.25}]
    sample = {"prompt_token_ids": [3, 11, 7], "prompt_logprobs": positions}
    (tmp_path / "a.json").write_text(json.dumps([sample, sample]))
    (tmp_path / "a.jsonl").write_text(json.dumps(sample) + "\n\n" + json.dumps(sample) + "\n")
    for name in ("a.json", "a.jsonl"):
        tables = read_logprobs(tmp_path / name)
        assert len(tables) == 2
        assert tables[1].ids.tolist() == [[11, 4], [7, -1]]
        assert tables[1].came.tolist() == [-0.5, -0.25]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "f.json: is no JSON"),
        ("{}", "f.json has no samples: it is a list of objects"),
        ("[]", "f.json has no samples"),
        ("[3]", "f.json, sample 0 has no prompt_token_ids"),
        ('[{"prompt_token_ids": [1, "2"]}]', "f.json, sample 0 has no prompt_token_ids"),
        ('[{"prompt_token_ids": [1, 2]}]', "f.json, sample 0: prompt_logprobs is a list that begins with null"),
        (
            '[{"prompt_token_ids": [1, 2], "prompt_logprobs": [null]}]',
            "f.json, sample 0: 1 positions of logprobs for 2",
        ),
        ('[{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"2": "x"}]}]', "no mapping of token ids to numbers"),
        (None, "f.json: there is no such file of logprobs"),
    ],
)
def test_a_file_without_what_it_needs_is_told(tmp_path, text, said):
    if text is not None:
        (tmp_path / "f.json").write_text(text)
    with pytest.raises(QsaError) as error:
        read_logprobs(tmp_path / "f.json")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"url": "localhost:8000"}, "write an address such as http://localhost:8000/v1"),
        ({"url": "file:///etc/passwd"}, "write an address such as"),
        ({"url": "http://user:secret@host/v1"}, "a password has no place in a suite"),
        ({"url": "http://host:99999/v1"}, "write an address such as"),
        ({"url": "http://host/v1?key=1"}, "write an address such as"),
        ({"url": "http://h/v1", "api_key_env": "AWS_SECRET_ACCESS_KEY"}, "QSA_"),
        ({"url": "http://h/v1", "top_logprobs": 0}, "greater than 0"),
        ({"url": "http://h/v1", "api": "tgi"}, "llama.cpp"),
    ],
)
def test_a_wrong_key_of_a_served_model_is_told(keys, said):
    with pytest.raises(ValueError, match="1 validation error") as error:
        Served(**keys)
    assert said in str(error.value)
