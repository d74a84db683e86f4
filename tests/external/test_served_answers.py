"""Answers of a served model to prompts: what is asked of the server, and what of its answers is compared."""

import json
import shutil

import pytest

from pytest_qsa.captures import GENERATION, LOGITS, Request
from pytest_qsa.common.errors import AnomalyError, InfraError
from pytest_qsa.external import bounded, capture_served
from pytest_qsa.external.served_answers import TOOL_CALL, _answer, _parsed
from pytest_qsa.metrics import METRICS, Answer
from pytest_qsa.suite import Data, Generation, Memory, Model, Served, Subject
from support.served_models import ServedModel, logprobs_of, serving

TEMPLATE = (
    "{{ tools }}{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)
ASKED = Generation(num_prompts=8, max_new_tokens=6)
GENERATES = Request("", "logits", None, METRICS["generation"].needs("logits", "all", {}))
LIKELIER = Request("", "logits", None, METRICS["same_top"].needs("logits", "all", {}))
OFFERED = [{"type": "function", "function": {"name": "get_weather"}}]


class Chat(ServedModel):
    """Answers each conversation with what `say` makes of the request."""

    def answer(self, path, body):
        if path != "/v1/chat/completions":
            return super().answer(path, body)
        message, reason = self.say(body)
        return {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}]}


@pytest.fixture(scope="module")
def original(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "original"
    shutil.copytree(llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def capture(original, say, requests=(GENERATES,), predict=None):
    served = Chat(predict)
    served.say = say
    with serving(served) as url:
        model = Model(served=Served(url=url, top_logprobs=20), reference=str(original))
        subject = Subject("it", model, Data(num_samples=1, seq_len=16), Memory(), original.parent, generation=ASKED)
        return capture_served(subject, list(requests)), [body for path, body, _ in served.requests if "chat" in path]


def test_a_server_is_asked_greedily_and_offered_the_tools_of_a_prompt(original):
    found, bodies = capture(original, lambda body: ({"content": "Yes."}, "stop"))
    assert [body["temperature"] for body in bodies] == [0] * 8
    assert {body["max_tokens"] for body in bodies} == {6}
    assert bodies[0]["messages"][0]["role"] == "user"
    offered = [body["tools"][0]["function"]["name"] for body in bodies if "tools" in body]
    assert set(offered) == {"get_weather"}
    assert 0 < len(offered) < 8
    numbers = found.sites[GENERATION, LOGITS].arrays["generation"]
    assert numbers[:, 3].tolist() == [1.0] * 8  # every answer of the server has ended, none of the reference's
    with pytest.raises(
        AnomalyError, match=r"none has an answer of the reference that ends: raise generation\.max_new_t"
    ):
        found.logits().generation()  # nothing can be lost


def test_answers_that_were_cut_off_have_not_ended_and_stand_beside_its_logprobs(original):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(original)
    found, _ = capture(
        original, lambda body: ({"content": "on and on"}, "length"), (GENERATES, LIKELIER),
        lambda tokens: logprobs_of(model, tokens),
    )  # fmt: skip
    assert found.sites[GENERATION, LOGITS].arrays["generation"][:, 3].tolist() == [0.0] * 8
    assert found.logits().same_top().values.tolist() == [1.0]
    for end in bounded(found):
        assert end.logits().generation("diverged_at").values.tolist() == [0.0]


@pytest.mark.parametrize(
    ("call", "sound"),
    [
        ({"name": "get_weather", "arguments": '{"city": "Oslo"}'}, True),
        ({"name": "get_weather", "arguments": '{"city": '}, False),
        ({"name": "get_weather", "arguments": '"Oslo"'}, False),
        ({"name": "weather", "arguments": "{}"}, False),
        ({"name": "get_weather"}, False),
        ("get_weather", False),
    ],
)
def test_a_tool_call_is_one_that_was_offered_with_arguments_that_are_json(call, sound):
    message = {"content": None, "tool_calls": [{"id": "1", "function": call}]}
    found = _answer({"message": message, "finish_reason": "tool_calls"}, OFFERED, None)
    assert (TOOL_CALL in found.marks) is sound
    assert found.ended


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def test_the_reference_is_read_as_a_server_parses_it():
    said = '<think>hm</think>Yes. <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    found = _parsed(Answer([1], said, True), Letters())
    message = {
        "content": "Yes. ", "reasoning_content": "hm",
        "tool_calls": [{"function": {"name": "get_weather", "arguments": "{}"}}],
    }  # fmt: skip
    served = _answer({"message": message, "finish_reason": "stop"}, OFFERED, Letters())
    assert (found.text, found.marks) == (served.text, served.marks)
    assert found.marks == {"thought", "tool call"}
    # A server that parses nothing leaves the tags in the text, which are then another markup.
    unparsed = _answer({"message": {"content": said}, "finish_reason": "stop"}, OFFERED, Letters())
    assert not unparsed.marks & found.marks


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda body: ({"content": 5}, "stop"), r"prompt 0: content of the answer is int"),
        (lambda body: ({"content": "x", "tool_calls": "none"}, "stop"), r"prompt 0: tool_calls of the answer is str"),
    ],
)
def test_an_answer_that_is_none_is_one_line(original, change, what):
    with pytest.raises(InfraError, match=what):
        capture(original, change)


def test_a_file_of_logprobs_answers_no_prompts(original, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps([]))
    model = Model(logprobs=str(tmp_path / "own.json"), reference=str(original))
    subject = Subject("it", model, Data(num_samples=1, seq_len=16), Memory(), tmp_path, generation=ASKED)
    with pytest.raises(InfraError, match=r"a file of logprobs answers no prompts: name the server, model\.served"):
        capture_served(subject, [GENERATES])
