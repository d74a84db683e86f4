"""The decode phase: what the sites of a model see one token at a time, against one forward over the whole text."""

import json

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import TOKENS, Request, merge_requests
from pytest_qsa.common.errors import InfraError
from pytest_qsa.engine.load.answers import in_steps
from pytest_qsa.engine.reference.live import LiveReference
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.engine.subject import capture_subject
from pytest_qsa.metrics import METRICS
from pytest_qsa.suite import Data, Memory, Model, NamedSubject
from support import models
from support.models import BLOCKS

SAMPLES = [([3, 9, 27, 17, 51], [25, 11, 33, 35]), ([8, 5], [40, 56, 40, 12, 6, 2, 1])]
OWN = [("magnitude", {}), ("absmax", {}), ("kurtosis", {})]
PAIR = [*OWN, ("sqnr", {})]
LOCAL = Request(r"o_proj$", "output", None, METRICS["local_sqnr"].needs("output", "all", {}))


def requests(asked, pattern=r"layers\.\d+(\.mlp(\.down_proj)?|\.self_attn\.o_proj)?$", site="output"):
    logits = METRICS["kl_divergence"].needs("logits", "all", {}) if asked is PAIR else frozenset()
    found = [Request(pattern, site, None, METRICS[name].needs(site, "all", own)) for name, own in asked]
    return merge_requests([*found, *([Request("", "logits", None, logits)] if logits else [])])


def whole(prompt, answer):
    return torch.tensor([[*prompt, *answer]])


def hidden_states(model, prompt, answer, layer):
    """Return what a block gives for the tokens of an answer, read in one forward, [T, C]."""
    with torch.no_grad():
        states = model(whole(prompt, answer), output_hidden_states=True).hidden_states
    return states[layer + 1][0, len(prompt) :].numpy()


def test_each_token_of_an_answer_is_seen_as_in_one_forward_over_the_text():
    model = models.llama()
    found = run_pass(model, in_steps(SAMPLES), requests(OWN))
    for sample, (prompt, answer) in enumerate(SAMPLES):
        assert found.tokens[sample].tolist() == answer
        for layer in (0, 2):  # hidden_states has the last block's after the final norm
            numbers = found.sites[f"model.layers.{layer}", "output"]
            np.testing.assert_allclose(
                numbers.tokens_of(sample), np.abs(hidden_states(model, prompt, answer, layer)).max(axis=1), rtol=1e-4
            )
    again = run_pass(model, in_steps(SAMPLES), requests(OWN))
    assert again.to_bytes() == found.to_bytes()


def test_what_enters_the_cache_is_seen_there():
    model = models.llama()
    asked = [Request(r"self_attn$", "key", None, METRICS["absmax"].needs("key", "all", {}) | {TOKENS})]
    found = run_pass(model, in_steps(SAMPLES), asked)
    texts = run_pass(model, [whole(*sample) for sample in SAMPLES], asked)
    for (layer, site), numbers in found.sites.items():
        for sample, (prompt, _) in enumerate(SAMPLES):
            want = texts.sites[layer, site].tokens_of(sample)[len(prompt) :]
            np.testing.assert_allclose(numbers.tokens_of(sample), want, rtol=1e-4)
    assert len(found.sites) == 4


@pytest.mark.parametrize("make", [models.llama, models.mixtral], ids=["llama", "mixtral"])
def test_a_pair_is_compared_there_as_over_the_text(make):
    model, other = make(), models.damaged(make())
    asked = merge_requests([*requests(PAIR, BLOCKS), LOCAL])
    found = run_pass(other, in_steps(SAMPLES), asked, [LiveReference(model)])
    texts = run_pass(other, [whole(*sample) for sample in SAMPLES], asked, [LiveReference(model)])
    for sample, (prompt, answer) in enumerate(SAMPLES):
        kept = slice(len(prompt), len(prompt) + len(answer))
        for layer in found.blocks:
            ours, theirs = (each.sites[layer, "output"] for each in (found, texts))
            own = np.split(ours.error, ours.offsets[1:-1])[sample]
            want = np.split(theirs.error, theirs.offsets[1:-1])[sample][kept]
            np.testing.assert_allclose(own, want, rtol=2e-3, atol=1e-6)
        ours, theirs = (each.sites["logits", "logits"] for each in (found, texts))
        own = np.split(ours.scores, ours.offsets[1:-1])[sample]
        np.testing.assert_allclose(
            own, np.split(theirs.scores, theirs.offsets[1:-1])[sample][kept], rtol=2e-3, atol=1e-5
        )
    assert found.output(LOCAL.pattern).local_sqnr(positions="all").values.min() > 0


def test_inputs_and_experts_are_seen_there_too():
    model = models.mixtral()
    asked = merge_requests(
        [Request(r"mlp\.experts$", "input", None, METRICS["expert_tokens"].needs("input", "all", {}))]
    )
    found = run_pass(model, in_steps(SAMPLES), asked)
    tokens = sum(len(answer) for _, answer in SAMPLES)
    totals = found.input(r"mlp\.experts$").expert_tokens().values.reshape(2, -1).sum(axis=1)
    assert totals.tolist() == [2 * tokens] * 2  # each token goes to two experts


def test_a_suite_measures_its_answers_token_by_token(llama, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "it"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    answers = {"max_new_tokens": 6, "phase": "decode"}
    data = Data(source="prompts", num_samples=3, seq_len=256, answers=answers)
    subject = NamedSubject("it", Model(path=str(folder), reference=str(folder)), data, Memory(), tmp_path)
    found = capture_subject(subject, requests(PAIR, BLOCKS))
    assert [len(ids) <= 6 for ids in found.tokens] == [True] * 3
    assert found.logits().kl_divergence().values.tolist() == [0.0]
    plain = data.model_copy(update={"answers": data.answers.model_copy(update={"phase": "prefill"})})
    texts = capture_subject(NamedSubject("it", subject.model, plain, Memory(), tmp_path), requests(PAIR, BLOCKS))
    # The same answers, with their prompts before them.
    assert [ids[-len(own) :].tolist() for ids, own in zip(texts.tokens, found.tokens, strict=True)] == [
        own.tolist() for own in found.tokens
    ]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    on_disk = NamedSubject("it", subject.model, data, Memory(offload_device="disk"), tmp_path)
    with pytest.raises(InfraError, match=r"phase: decode needs the whole model at each token"):
        capture_subject(on_disk, requests(PAIR, BLOCKS))


def test_generation_is_asked_of_a_suite_not_of_a_model():
    with pytest.raises(ValueError, match=r"generation has prompts answered, which a suite names"):
        capture(models.llama(), [torch.tensor([[1, 2]])], sites=[("", "logits")], statistics=["generation"])
