"""Served models and files of logprobs as subjects: what is exact, what lies between bounds, and what that decides."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

from pytest_qsa.captures.capture import Capture
from pytest_qsa.common.errors import AnomalyError, InfraError, SuiteError
from pytest_qsa.engine.subject import capture_subject
from pytest_qsa.external.served_capture import capture_served
from pytest_qsa.suite import Subject, load_suite
from pytest_qsa.verdicts.judge import Measurement
from pytest_qsa.verdicts.verdict import Kind
from support.checkpoints import save_llama
from support.judged import judged
from support.projects import Project
from support.served_models import ServedModel, logprobs_of, serving

VOCABULARY, SAMPLES, LENGTH = 320, 3, 32
EVERY = ("kl_divergence, max: 0", "same_top, min: 2", "perplexity, max: 0", "ln_ppl_ratio, max: -9", "delta_p, max: 0")
"""Assertions that fail, so that each tells its value."""


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Return the small Llama with 2 % of noise on the weights of its MLPs: what a quantization does."""

    def change(weights):
        generator = torch.Generator().manual_seed(1)
        for name, weight in weights.items():
            if "mlp" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.02 * weight.std())

    return save_llama(tmp_path_factory.mktemp("checkpoints") / "noisy", change)


@pytest.fixture(scope="module")
def models(llama, noisy):
    """Return the model of each folder."""
    from transformers import AutoModelForCausalLM

    return {folder: AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (llama, noisy)}


@pytest.fixture(scope="module")
def served(models, noisy):
    """Return the noisy Llama behind vLLM's API, which may tell its whole vocabulary."""
    told = ServedModel(lambda tokens: logprobs_of(models[noisy], tokens))
    told.most = VOCABULARY
    return told


@pytest.fixture(scope="module")
def address(served):
    with serving(served) as url:
        yield url


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("served") / "project")


def suite(model, *assertions):
    lines = "".join(f"  - {{id: a{n}, metric: {assertion}}}\n" for n, assertion in enumerate(assertions))
    data = f"data: {{num_samples: {SAMPLES}, seq_len: {LENGTH}}}"
    return f"model: {{name: m, {model}}}\n{data}\nassertions:\n{lines}"


class Judge:
    """Judges assertions without pytest around it: one capture of each model."""

    def __init__(self, project):
        self.project = project
        self.captures = {}

    def loaded(self, model, *assertions):
        return load_suite(self.project.write("gate.qsa.yaml", suite(model, *assertions)))

    def capture(self, model, sections=""):
        """Return the capture of a model, with all that its predictions can be asked for."""
        if model not in self.captures:
            every = EVERY if "reference" in model else EVERY[2:3]
            file = load_suite(self.project.write("gate.qsa.yaml", suite(model, *every) + sections))
            spec = file.suite
            subject = Subject("m", spec.model, spec.data, spec.memory, self.project.folder)
            run = capture_served if spec.model.logprobs_only else capture_subject
            self.captures[model] = run(subject, [assertion.request for assertion in file.assertions])
        return self.captures[model]

    def __call__(self, model, *assertions):
        capture = self.capture(model)
        return [self.verdict(assertion, capture) for assertion in self.loaded(model, *assertions).assertions]

    @staticmethod
    def verdict(assertion, capture):
        return judged(assertion, Measurement(capture, baseline=None))

    def values(self, model):
        return [verdict.rows[0].value for verdict in self(model, *EVERY)]


@pytest.fixture(scope="module")
def judge(project):
    return Judge(project)


def full(address, **keys):
    more = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"served: {{url: '{address}/v1', top_logprobs: {VOCABULARY}{more}}}"


def top(address, k=60):
    return f"served: {{url: '{address}/v1', top_logprobs: {k}}}"


@pytest.fixture(scope="module")
def truth(models, llama, noisy, judge):
    """Return ln p and ln q of every position of the data, in float64: [N, T, V] each, and the tokens [N, T]."""
    capture = judge.capture(f"path: {llama}")
    tokens = np.stack(capture.tokens)
    logits = []
    for folder in (llama, noisy):
        with torch.no_grad():
            logits.append(models[folder](torch.from_numpy(tokens.astype(np.int64))).logits.double().numpy())
    return [
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in logits
    ], tokens


def test_a_model_that_tells_everything_has_the_numbers_of_the_local_one(judge, address, llama, noisy, truth):
    (p, q), tokens = truth
    kl = (np.exp(p) * (p - q)).sum(-1)
    own, theirs = (-np.take_along_axis(x[:, :-1], tokens[:, 1:, None], 2)[..., 0] for x in (q, p))
    same = p.argmax(-1) == q.argmax(-1)
    moved = np.exp(-own) - np.exp(-theirs)
    rest = [np.exp(own.mean()), (own - theirs).mean(), np.sqrt((moved**2).mean())]
    told = judge.values(f"{full(address)}, reference: {llama}")
    np.testing.assert_allclose(told, [kl[:, :-1].mean(), same[:, :-1].mean(), *rest], rtol=2e-4)
    local = judge.values(f"path: {noisy}, reference: {llama}")
    np.testing.assert_allclose(local, [kl.mean(), same.mean(), *rest], rtol=2e-4)


def test_the_same_tokens_at_depth_are_found_in_a_served_text_too(project, address, llama, noisy):
    growth = "growth, paired: true, positions: {from: 18, to: 23}, max: 9"
    values = []
    for model, run in ((full(address), capture_served), (f"path: {noisy}", capture_subject)):
        text = suite(f"{model}, reference: {llama}", growth)
        text = text.replace(
            f"{{num_samples: {SAMPLES}, seq_len: {LENGTH}}}", "{num_samples: 9, seq_len: 24, stride: 12}"
        )
        file = load_suite(project.write("growth.qsa.yaml", text))
        spec, (assertion,) = file.suite, file.assertions
        capture = run(Subject("m", spec.model, spec.data, spec.memory, project.folder), [assertion.request])
        values.append(Judge.verdict(assertion, capture).rows[0].value)
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_the_divergence_of_a_model_that_tells_some_lies_between_its_bounds(judge, address, llama, truth):
    (p, q), tokens = truth
    kl = (np.exp(p) * (p - q)).sum(-1)[:, :-1].mean()
    (verdict,) = judge(f"{top(address)}, reference: {llama}", "kl_divergence, max: 0")
    assert verdict.failed
    assert 0.3 * kl < verdict.rows[0].value < kl
    share = outside(p, q, tokens, 60)
    assert verdict.headline.endswith(
        f"and ∞: 60 tokens of a position are told, and the reference has {share:.3%} outside)"
    )
    floor = f"tail: {{at_least: {q.min() - 0.01}}}"
    (held,) = judge(f"{top(address)}, {floor}, reference: {llama}", "kl_divergence, max: 9")
    assert not held.failed
    assert kl < held.rows[0].value < np.inf


def outside(p, q, tokens, k):
    """Return what the reference has outside the k tokens that are told of each position, and the one that came."""
    told = np.zeros(q.shape, dtype=bool)
    np.put_along_axis(told, np.argsort(-q, axis=-1, kind="stable")[..., :k], True, axis=-1)
    np.put_along_axis(told[:, :-1], tokens[:, 1:, None], True, axis=-1)
    return float(np.where(told, 0.0, np.exp(p))[:, :-1].sum(-1).mean())


def test_a_bound_between_the_two_decides_nothing(judge, address, llama):
    (verdict,) = judge(f"{top(address)}, reference: {llama}", "kl_divergence, max: 1")
    assert verdict.kind is Kind.ANOMALOUS
    assert re.match(r"^kl_divergence is between 0\.00\d+ and ∞: 60 tokens .* that decides nothing", verdict.headline)


def test_what_may_be_assumed_of_the_rest_is_said_with_the_number(judge, address, llama):
    tail = f"{top(address)}, tail: as_reference, reference: {llama}"
    verdicts = judge(tail, "kl_divergence, max: 1", "kl_divergence, max: 0.0001", "same_top, min: 0.5")
    assert [verdict.failed for verdict in verdicts] == [False, True, False]
    assert "(at least; the rest is taken to be shared out as the reference's: 60 tokens" in verdicts[0].headline
    assert "taken to be" not in verdicts[2].headline


def test_what_is_exact_of_a_model_that_tells_some_is_judged_as_ever(judge, address, llama):
    some = judge(f"{top(address, 5)}, reference: {llama}", *EVERY[1:])
    whole = judge(f"{full(address)}, reference: {llama}", *EVERY[1:])
    assert [verdict.rows[0].value for verdict in some] == pytest.approx([verdict.rows[0].value for verdict in whole])
    assert not any("between" in verdict.headline for verdict in some)


def test_a_python_test_gets_no_number_that_is_not_known(judge, address, llama):
    capture = judge.capture(f"{top(address)}, reference: {llama}")
    with pytest.raises(AnomalyError, match="kl is known of"):
        capture.logits().kl_divergence()
    assert capture.logits().perplexity().values[0] > 1


def test_the_bounds_are_kept_in_the_captures_file(judge, address, llama, tmp_path):
    model = f"{top(address)}, reference: {llama}"
    capture = judge.capture(model)
    capture.save(tmp_path / "served.qsa")
    (assertion,) = judge.loaded(model, "kl_divergence, max: 0").assertions
    again = judge.verdict(assertion, Capture.load(tmp_path / "served.qsa"))
    assert again.headline == judge.verdict(assertion, capture).headline


@pytest.mark.parametrize("api", ["sglang", "llama.cpp"])
def test_other_servers_tell_the_same_numbers(judge, address, llama, api):
    assert judge.values(f"{full(address, api=api)}, reference: {llama}") == pytest.approx(
        judge.values(f"{full(address)}, reference: {llama}"), rel=1e-4
    )


def test_a_metric_of_the_whole_distribution_is_not_to_be_had_of_a_server(judge, address, llama):
    (verdict,) = judge(f"{top(address)}, reference: {llama}", "boundary_tokens, min: 0.9")
    assert verdict.kind is Kind.ANOMALOUS
    assert verdict.headline.startswith("boundary_tokens needs the probability of every token")


def test_a_token_that_came_and_was_not_told_leaves_the_perplexity_open(judge, address, llama):
    some = f"served: {{url: '{address}', api: llama.cpp, top_logprobs: 60}}, reference: {llama}"
    (verdict,) = judge(some, "perplexity, max: 1")
    assert verdict.failed
    assert "between" in verdict.rows[0].detail
    for assertion in ("perplexity, max: 1000000", "delta_p, max: 0"):
        (verdict,) = judge(some, assertion)
        assert verdict.kind is Kind.ANOMALOUS
        assert "decides nothing" in verdict.headline


def recorded(served, tokens, k):
    """Return samples as a file of logprobs has them."""
    samples = []
    for row in tokens.tolist():
        answer = served.answer("/v1/completions", {"prompt": row, "prompt_logprobs": k})
        samples.append({"prompt_token_ids": row, "prompt_logprobs": answer["choices"][0]["prompt_logprobs"]})
    return samples


def test_a_file_of_what_a_server_said_stands_in_for_it(judge, served, address, llama, truth):
    judge.project.write("said.jsonl", "".join(f"{json.dumps(s)}\n" for s in recorded(served, truth[1], VOCABULARY)))
    told = judge.values(f"logprobs: said.jsonl, reference: {llama}")
    assert told == pytest.approx(judge.values(f"{full(address)}, reference: {llama}"))


@pytest.mark.process
def test_two_files_are_compared_without_torch(judge, served, models, llama, truth):
    (p, q), tokens = truth
    reference = ServedModel(lambda ids: logprobs_of(models[llama], ids))
    reference.most = VOCABULARY
    judge.project.write("own.json", json.dumps(recorded(served, tokens, VOCABULARY)))
    judge.project.write("ref.json", json.dumps(recorded(reference, tokens, VOCABULARY)))
    kl = (np.exp(p) * (p - q)).sum(-1)[:, :-1].mean()
    model = "logprobs: own.json, reference: ref.json"
    judge.project.write(
        "files.qsa.yaml", suite(model, f"kl_divergence, max: {kl * 1.001}", f"kl_divergence, max: {kl * 0.999}")
    )
    code = (
        "import sys, pytest\n"
        "pytest.main(['-q', 'files.qsa.yaml', '--qsa-report=never', '-p', 'no:randomly', '-p', 'no:html'])\n"
        "print('found', [name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = judge.project.program(sys.executable, "-c", code)
    assert "1 failed, 1 passed" in done.stdout
    assert "found []" in done.stdout


def test_files_of_other_tokens_are_not_compared(judge, served, truth):
    judge.project.write("one.json", json.dumps(recorded(served, truth[1], 5)))
    judge.project.write("two.json", json.dumps(recorded(served, truth[1][:, ::-1], 5)))
    with pytest.raises(AnomalyError, match="the logprobs of the reference are of other tokens"):
        judge("logprobs: one.json, reference: two.json", "same_top, min: 0")


def test_a_reference_of_another_vocabulary_is_told(judge, llama):
    rows = [None, {"5000": -0.1, "3": -4.0}]
    judge.project.write("odd.json", json.dumps([{"prompt_token_ids": [1, 3], "prompt_logprobs": rows}]))
    with pytest.raises(AnomalyError, match="predicts the token 5000 and the reference has 320 of them"):
        judge(f"logprobs: odd.json, reference: {llama}", "same_top, min: 0")


def test_a_reference_that_predicts_nan_is_nothing_to_compare_with(tmp_path, judge, served, truth):
    broken = save_llama(tmp_path / "nan", lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    judge.project.write("few.json", json.dumps(recorded(served, truth[1], 5)))
    with pytest.raises(AnomalyError, match="the reference predicts NaN or Inf"):
        judge(f"logprobs: few.json, reference: {broken}", "same_top, min: 0")


def test_a_reference_on_disk_says_the_same(project, judge, address, llama):
    model = f"{full(address)}, reference: {llama}"
    streamed = Judge(project)
    streamed.capture(model, sections="memory: {offload_device: disk}\n")
    assert streamed.values(model) == pytest.approx(judge.values(model), rel=1e-9)


def test_perplexity_needs_a_tokenizer_and_no_reference(judge, address, llama):
    alone = judge(full(address, tokenizer=llama), "perplexity, max: 1")[0].rows[0].value
    assert alone == pytest.approx(judge.values(f"{full(address)}, reference: {llama}")[2])
    with pytest.raises(InfraError, match=r"there is no tokenizer .* served\.tokenizer"):
        judge(full(address), "perplexity, max: 1")


@pytest.mark.process
def test_a_served_subject_in_pytest(project, served, address, llama, noisy):
    project.write("a.qsa.yaml", suite(
        f"{top(address, 20)}, reference: {llama}", "kl_divergence, max: 0", "kl_divergence, max: 1",
        "same_top, min: 0.5", "absmax, layers: x, site: output, max: 1", "checkpoint_keys",
        "perplexity, baseline: {rel: 0.1}",
    ))  # fmt: skip
    run = project.pytest("a.qsa.yaml")
    kinds = [run.first_line(f"::a{n}").partition(" ")[0] for n in (0, 1, 3, 4, 5)]
    assert kinds == ["REGRESSION", "ANOMALOUS", "ANOMALOUS", "INFRA", "ANOMALOUS"]
    assert run.report("::a2")["outcome"] == "passed"
    assert "absmax is measured at layers, and a served model tells of its predictions only" in run.first_line("::a3")
    assert run.kind("::a4") == "INFRA"
    (ran,) = run.labelled("::a0")["ran"]
    assert ran.startswith(f"m: {address}/v1; ")
    assert all(word in ran for word in ("vllm", "20 logprobs", str(llama), "3 × 32 tokens"))
    assert project.pytest("a.qsa.yaml::a5", "--snapshot-update").code == 0
    local = project.pytest("a.qsa.yaml::a5", f"--qsa-model={noisy}")
    assert local.code == 0, local.out


@pytest.mark.process
def test_a_server_that_is_not_there_is_infra_and_told_by_the_first_assertion(project, llama):
    project.write("b.qsa.yaml", suite(f"served: {{url: 'http://127.0.0.1:1/v1'}}, reference: {llama}", *EVERY[:2]))
    run = project.pytest("b.qsa.yaml")
    assert run.first_line("::a0").startswith("INFRA a0: http://127.0.0.1:1/v1/models: ")
    assert run.first_line("::a1").startswith("INFRA a1: could not be judged")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("path: x, served: {url: 'http://h/v1'}", "give one of path, factory, served and logprobs"),
        ("served: {}", "the key 'url' is missing"),
        ("served: {url: 'h:1'}", "url: write an address such as http://localhost:8000/v1, not 'h:1'"),
        ("served: {url: 'http://h', top_logprob: 3}", "unknown key 'top_logprob' (did you mean 'top_logprobs'?)"),
        ("served: {url: 'http://h', api_key_env: AWS_SECRET}", "api_key_env: "),
        ("served: {url: 'http://h', top_logprobs: many}", "top_logprobs: "),
        ("logprobs: 3", "logprobs: "),
        ("logprobs: f.json, tail: none", "tail: "),
        ("logprobs: f.json, tail: {at_least: 1}", "at_least: "),
        ("logprobs: f.json, tail: {at_leas: -1}", "unknown key 'at_leas'"),
        ("served: {url: 'http://h'}, name: m", "kl_divergence compares with the original"),
    ],
)
def test_a_wrong_key_is_told_with_its_line(tmp_path, model, said):
    (tmp_path / "gate.qsa.yaml").write_text(
        f"model: {{{model}}}\nassertions:\n  - {{id: a, metric: kl_divergence, max: 1}}\n"
    )
    with pytest.raises(SuiteError, match=r"gate\.qsa\.yaml:[13]: ") as error:
        load_suite(tmp_path / "gate.qsa.yaml")
    assert said in str(error.value)
