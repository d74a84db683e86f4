"""Participants of a pass: what they get and when, what makes a pass start again, and whose failure it is."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from pytest_qsa import capture
from pytest_qsa.captures import ALL_STATISTICS, COUNTS, MOMENTS, Request
from pytest_qsa.common import AnomalyError, InfraError, Scratch, SuiteError
from pytest_qsa.engine.load.models import Loaded
from pytest_qsa.engine.modules import forward_errors
from pytest_qsa.engine.reference.live import LiveReference
from pytest_qsa.engine.reference.pair_statistics import run_rows
from pytest_qsa.engine.run.observed_execution import rounds_inputs
from pytest_qsa.engine.run.participant import Need, Participant, Restart
from pytest_qsa.engine.run.rehearsal import rehearse
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.engine.run.site_statistics import SiteStatistics
from pytest_qsa.engine.subject import capture_loaded
from pytest_qsa.suite import Data, Memory, Subject
from support.captures import statistics

OUTPUTS = Request("^[ab]$", "output", None, frozenset({MOMENTS}))
BATCHES = [torch.ones(2, 5, 8), torch.ones(1, 5, 8)]


class Twice(nn.Module):
    """Two layers, one after the other; `head` follows them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.head(self.b(self.a(x)))


class Script(Participant):
    """Writes down what the pass calls; `restarts`: how often it asks for another attempt."""

    def __init__(self, needs=Need.NOTHING, restarts=0):
        self.needs = needs
        self.sites = frozenset({("a", "output")})
        self.awaited_weights = frozenset({"b"})
        self.calls = []
        self.restarts = restarts

    def prepare(self, run, exits):
        self.calls.append("prepare")
        exits.callback(self.calls.append, "left")

    def begin(self, exits):
        self.calls.append("begin")

    def forward_started(self, forward):
        self.calls.append(f"start {forward.rows.samples}")

    def visit(self, forward, site, call, tensor, inputs):
        self.calls.append(f"visit {site[0]} {tuple(tensor.shape)}")

    def forward_ended(self, forward, output):
        self.calls.append("whole" if output is not None else f"stopped at {forward.stopped_at[0]}")
        if self.restarts:
            self.restarts -= 1
            raise Restart("it was asked for")

    def weights_loaded(self, layers):
        self.calls.append(f"weights {'b' in layers}")

    def finish(self, numbers):
        self.calls.append(f"finish {sorted(site[0] for site in numbers)}")


FORWARDS = ["start [0, 1]", "visit a (2, 5, 8)", "whole", "start [2]", "visit a (1, 5, 8)"]
END = ["weights True", "finish ['a', 'b']", "left"]


@pytest.mark.parametrize(
    ("needs", "last"), [(Need.NOTHING, "stopped at b"), (Need.WHOLE_FORWARDS, "whole")], ids=["stopped", "whole"]
)
def test_a_participant_is_called_in_order_and_a_forward_runs_as_far_as_one_of_them_needs(needs, last):
    script = Script(needs)
    run_pass(Twice(), BATCHES, [OUTPUTS], [script])
    assert script.calls == ["prepare", "begin", *FORWARDS, last, *END]


def test_one_forward_is_enough_for_who_needs_one_beside_weights():
    script = Script(Need.ONE_FORWARD)
    script.sites = frozenset()
    weights = Request("^a$", "weight", None, frozenset({MOMENTS}))
    found = run_pass(Twice(), BATCHES, [weights], [script])
    assert script.calls == ["prepare", "begin", "start [0, 1]", "whole", "weights True", "finish ['a']", "left"]
    assert list(found.sites) == [("a", "weight")]


def test_a_participant_may_start_the_pass_again_and_the_log_says_why(caplog):
    caplog.set_level(logging.DEBUG, "pytest_qsa")
    script, model = Script(restarts=2), Twice()
    found = run_pass(model, BATCHES, [OUTPUTS], [script])
    assert script.calls.count("begin") == 3
    assert found.to_bytes() == run_pass(model, BATCHES, [OUTPUTS]).to_bytes()
    assert caplog.messages.count("the pass starts again: it was asked for") == 2
    assert any("3 samples, 3 attempts: forwards took" in message for message in caplog.messages)


class Swallows(Twice):
    """Catches whatever its layers raise, as code with a fallback does."""

    def forward(self, x):
        try:
            return super().forward(x)
        except Exception:
            return super().forward(x * 2)


def test_a_model_that_catches_exceptions_is_stopped_all_the_same():
    script = Script()
    run_pass(Swallows(), BATCHES, [OUTPUTS], [script])
    assert script.calls[6:8] == ["visit a (1, 5, 8)", "stopped at b"]


class Shares(nn.Module):
    """`a` and `b` read the same tensor; a negative batch calls `b` once more."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return self.b(x) + y if x[0, 0, 0] < 0 else y


def test_a_reference_that_calls_its_layers_otherwise_restarts_the_pass():
    torch.manual_seed(0)
    model, reference = Shares(), Shares()
    batches = [torch.rand(1, 5, 8), -torch.rand(1, 5, 8)]
    request = Request("a|b", "input", None, statistics("error", "reference_tokens"))
    found = run_pass(model, batches, [request], [LiveReference(reference)])
    alone = [run_pass(model, batches, [Request(n, "input", None, request.statistics)], [LiveReference(reference)])
             for n in "ab"]  # fmt: skip
    for name, single in zip("ab", alone, strict=True):
        for one, other in ((found, single), (found.reference, single.reference)):
            ours, theirs = one.sites[name, "input"], other.sites[name, "input"]
            np.testing.assert_array_equal(ours.call, theirs.call)
            for array in theirs.arrays:
                np.testing.assert_array_equal(ours.arrays[array], theirs.arrays[array])


def test_predictions_that_are_not_compared_let_the_reference_stop():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)

        def forward(self, ids):
            return self.head(self.block(self.embed(ids)))

    ids = [torch.arange(8)[None], torch.arange(8)[None] + 3]
    requests = [
        Request("block", "output", None, statistics("error")),
        Request("", "logits", None, statistics("scores")),
    ]
    found = run_pass(Model(), ids, requests, [LiveReference(Model())])
    assert {site for _, site in found.sites} == {"output", "logits"}


def test_a_reference_of_another_vocabulary_is_a_fault_of_the_checkpoint():
    class Model(nn.Module):
        def __init__(self, tokens):
            super().__init__()
            self.embed, self.head = nn.Embedding(tokens, 8), nn.Linear(8, tokens)

        def forward(self, ids):
            return self.head(self.embed(ids))

    requests = [Request("", "logits", None, statistics("scores", "agreement"))]
    with pytest.raises(AnomalyError, match="predicts 16 tokens and its reference 20: they can't be compared"):
        run_pass(Model(16), [torch.arange(8)[None]], requests, [LiveReference(Model(20))])


# Whose failure it is.


class Fails(nn.Module):
    """Raises an error in its forward."""

    def __init__(self, error):
        super().__init__()
        self.a, self.error = nn.Linear(8, 8), error

    def forward(self, x):
        self.a(x)
        raise self.error


FAILURES = {
    "value": (ValueError("wrong shape\nand more"), "failed: ValueError: wrong shape$"),
    "key": (KeyError("cache"), "failed: KeyError: 'cache'$"),
    "silent": (RuntimeError(), "failed: RuntimeError: RuntimeError$"),
    "memory": (
        torch.OutOfMemoryError("CUDA out of memory"),
        r"ran out of memory \(CUDA out of memory\): lower data.seq",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_a_forward_raises_is_infra_and_names_the_model(name):
    error, text = FAILURES[name]
    subject = Subject("x", None, Data(), Memory(), Path())
    with pytest.raises(InfraError, match=f"^the forward pass of Fails {text}") as caught:
        capture_loaded(subject, Loaded(Fails(error), None), BATCHES, [OUTPUTS])
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_the_forward_of_a_reference_raises_names_the_reference(name):
    error, text = FAILURES[name]
    with pytest.raises(InfraError, match=f"^the forward pass of the reference, Fails, {text}"):
        capture(Twice(), BATCHES, sites=[("^a$", "output")], statistics="all", reference=Fails(error))


def test_our_own_errors_and_those_of_a_library_user_pass_as_they_are():
    for error in (SuiteError("a"), AnomalyError("b")):
        with pytest.raises(type(error)), forward_errors("x"):
            raise error
    with pytest.raises(ValueError, match="wrong shape"):
        capture(Fails(ValueError("wrong shape")), BATCHES, sites=[("a", "output")])


class Layer(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def test_a_lack_of_memory_is_not_taken_for_a_layer_that_cannot_be_fed_with_single_tokens():
    with pytest.raises(torch.OutOfMemoryError):
        run_rows(Layer(torch.OutOfMemoryError("no memory")), "a", torch.ones(3, 8))
    for error in (TypeError("needs a mask"), RuntimeError("wrong shape")):
        with pytest.raises(AnomalyError, match="a needs more than that") as caught:
            run_rows(Layer(error), "a", torch.ones(3, 8))
        assert caught.value.__cause__ is error


class UnknownLinear(nn.Linear):
    """A linear layer whose weight no format knows, or whose multiplication fails."""

    def __init__(self, error=None):
        super().__init__(8, 8, bias=False)
        self.weight.requires_grad_(requires_grad=False)
        self.weight.data = self.weight.data.to(torch.int8) if error is None else self.weight.data
        self.error = error

    @property
    def bias(self):
        if self.error is not None:
            raise self.error
        return None

    @bias.setter
    def bias(self, value):
        pass


def test_how_a_module_rounds_its_inputs_is_logged_where_it_cannot_be_observed(caplog):
    caplog.set_level(logging.DEBUG, "pytest_qsa")
    x = torch.ones(1, 3, 8)
    assert rounds_inputs(UnknownLinear(), x, x) is None
    assert rounds_inputs(UnknownLinear(RuntimeError("no kernel")), x, x) is None
    assert [message.partition(": ")[0] for message in caplog.messages] == [
        "whether a UnknownLinear rounds its inputs can't be observed"
    ] * 2
    assert "no kernel" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        rounds_inputs(UnknownLinear(torch.OutOfMemoryError("no memory")), x, x)


class ByValue(Twice):
    """Decides by a value, which a forward without data hasn't."""

    def forward(self, x):
        return self.head(self.b(self.a(x))) if float(x.sum()) > 0 else self.a(x)


def test_a_model_that_cannot_be_rehearsed_is_named_and_runs_to_its_end(caplog):
    caplog.set_level(logging.DEBUG, "pytest_qsa")
    model = ByValue().to("meta")
    found = SiteStatistics({("a", "output"): frozenset({COUNTS})}, dict(model.named_children()))
    rehearse(model, found, BATCHES[0])
    assert found.rehearsed is None
    assert "ByValue can't be run without data" in caplog.text
    twice = Twice().to("meta")
    rehearsed = SiteStatistics({("a", "output"): frozenset({COUNTS})}, dict(twice.named_children()))
    rehearse(twice, rehearsed, BATCHES[0])
    assert rehearsed.rehearsed.last == (("a", "output"), 0)


class Block(nn.Module):
    """Calls `sees` with what goes into it."""

    def __init__(self, sees):
        super().__init__()
        self.layer, self.sees = nn.Linear(8, 8), sees

    def forward(self, x):
        self.sees(x)
        return self.layer(x)


@pytest.mark.parametrize("needs_fake", [False, True])
def test_blocks_are_rehearsed_on_plain_tensors_and_on_fake_ones_where_they_need_these(needs_fake):
    seen = []

    def sees(x):
        seen.append(type(x))
        if needs_fake:
            assert isinstance(x, FakeTensor)

    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([Block(sees), Block(sees)]), nn.Linear(8, 8)).to("meta")
    model.forward = lambda x: model[2](model[1][1](model[1][0](model[0](x))))
    found = SiteStatistics({("1.1.layer", "output"): frozenset({COUNTS})}, dict(model.named_modules()))
    rehearse(model, found, BATCHES[0])
    assert found.rehearsed.last == (("1.1.layer", "output"), 0)
    assert seen == ([torch.Tensor, FakeTensor, FakeTensor] if needs_fake else [torch.Tensor, torch.Tensor])
    assert not any("forward" in block.__dict__ for block in model[1])


def test_our_own_error_in_a_rehearsal_is_raised():
    with pytest.raises(InfraError, match="a mask of padding"):
        rehearse(Twice(), SiteStatistics({}, {}), {"x": BATCHES[0], "attention_mask": torch.zeros(2, 5, 1)})


def test_a_loaded_model_is_closed_with_its_folder():
    scratch = Scratch("qsa-test")
    Loaded(Twice(), None, scratch).close()
    assert not Path(scratch.name).exists()


def test_all_statistics_are_the_same_with_a_participant_that_only_looks():
    model = Twice()
    requests = [Request("^[ab]$", site, None, ALL_STATISTICS) for site in ("input", "output")]
    assert run_pass(model, BATCHES, requests, [Script()]).to_bytes() == run_pass(model, BATCHES, requests).to_bytes()
