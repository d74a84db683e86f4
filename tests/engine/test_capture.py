"""The pass: what it reads, what it doesn't run, what it leaves behind; batching and sharing change no number."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from pytest_qsa import Capture, capture
from pytest_qsa.captures import HeatMap, Request
from pytest_qsa.captures.sites import SiteNumbers
from pytest_qsa.common import collector
from pytest_qsa.common.errors import AnomalyError, InfraError, SuiteError
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.engine.subject import in_transformers
from pytest_qsa.engine.subject.capture import capture_subject
from pytest_qsa.metrics.selection import NotMeasuredError
from pytest_qsa.suite import Data, Memory, Model, Subject
from support import models, oracle
from support.captures import statistics

quick = settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def assert_same(one: SiteNumbers, other: SiteNumbers, but=()):
    (arrays, header), (others, other_header) = one.to_arrays(), other.to_arrays()
    assert header == other_header
    assert arrays.keys() - {*but} == others.keys() - {*but}
    for name in arrays.keys() - {*but}:
        assert arrays[name].dtype == others[name].dtype, name
        np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)


def all_equal(one: Capture, other: Capture):
    assert one.sites.keys() == other.sites.keys()
    for site in one.sites:
        assert_same(one.sites[site], other.sites[site])


def counting(model, *layers):
    """Count the calls of the root and of some layers."""
    calls = dict.fromkeys(("", *layers), 0)

    def hook(name):
        def count(*_):
            calls[name] += 1

        return count

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in calls]
    return calls, handles


# One pass.


def test_there_is_one_forward_a_batch():
    model = models.llama()
    calls, _ = counting(model)
    sites = [(r"layers\.\d+$", "output"), ("mlp", "input"), (r"q_proj$", "weight")]
    capture(model, [models.token_batch(2, 8, seed=i) for i in range(5)], sites=sites)
    assert calls[""] == 5


def test_a_weight_needs_no_forward():
    model = models.llama()
    calls, _ = counting(model)
    cap = capture(model, [models.token_batch(2, 8)], sites=[(r"q_proj$", "weight")])
    assert calls[""] == 0
    assert len(cap.weight("q_proj").magnitude("top1").layers) == 4


def test_after_the_first_batch_nothing_runs_past_the_last_site():
    model = models.llama()
    calls, _ = counting(model, "model.layers.1", "model.layers.2", "lm_head")
    batches = [models.token_batch(2, 8, seed=i) for i in range(4)]
    cap = capture(model, batches, sites=[(r"layers\.1\.mlp$", "output")], statistics=["rms"])
    assert calls == {"": 4, "model.layers.1": 4, "model.layers.2": 1, "lm_head": 1}
    populations = models.record(model, batches, "model.layers.1.mlp", "output")
    np.testing.assert_allclose(cap.output(r"1\.mlp$").rms().values, [oracle.rms(populations)], 1e-6)
    assert cap.output(r"1\.mlp$").absmax().values == [oracle.absmax(populations)]


def test_the_head_runs_where_its_output_is_asked_for():
    model = models.llama()
    calls, _ = counting(model, "lm_head")
    batches = [models.token_batch(2, 8, seed=i) for i in range(3)]
    cap = capture(model, batches, sites=[("lm_head", "output"), (r"layers\.0$", "output")])
    assert calls["lm_head"] == 3
    assert cap.output("lm_head").absmax().values == [oracle.absmax(models.record(model, batches, "lm_head", "output"))]


class Alternating(nn.Module):
    """Calls its two layers in an order that the data decide, or only one of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Identity(), nn.Identity()

    def forward(self, x):
        for layer in {1: (self.a, self.b), 2: (self.b, self.a), 4: (self.a,)}[int(x[0, 0, 0])]:
            layer(x * 2)


def test_a_layer_that_is_called_in_another_order_than_in_the_first_batch_is_not_missed():
    batches = [torch.full((1, 2, 2), float(order)) for order in (1, 2)]
    cap = capture(Alternating(), batches, sites=[("a|b", "output")])
    assert cap.output("a|b").absmax().values.tolist() == [4, 4]


def test_a_layer_that_is_not_called_for_one_batch_has_fewer_populations():
    batches = [torch.full((1, 2, 2), float(order)) for order in (4, 1, 4)]
    cap = capture(Alternating(), batches, sites=[("a|b", "output")])
    assert cap.sites["a", "output"].sample.tolist() == [0, 1, 2]
    assert cap.sites["b", "output"].sample.tolist() == [1]


def test_batches_may_come_from_a_generator_and_samples_are_numbered_through():
    model = models.llama()
    batches = [models.token_batch(2, 8), models.token_batch(3, 6)]
    cap = capture(model, (batch for batch in batches), sites=[(r"layers\.0$", "output")])
    assert cap.sites["model.layers.0", "output"].sample.tolist() == [0, 1, 2, 3, 4]
    assert [len(ids) for ids in cap.tokens] == [8, 8, 6, 6, 6]
    np.testing.assert_array_equal(cap.tokens[4], batches[1][2].numpy())
    all_equal(cap, capture(model, batches, sites=[(r"layers\.0$", "output")]))


def test_progress_is_told_after_every_batch():
    seen = []
    capture(
        models.Mlp(),
        [torch.randn(2, 8), torch.randn(3, 8)],
        sites=[("first", "output")],
        progress=lambda *n: seen.append(n),
    )
    assert seen == [(2, 5), (5, 5)]


def test_layers_come_in_model_order_whatever_the_order_of_the_sites():
    model = models.llama()
    cap = capture(model, [models.token_batch(1, 4)], sites=[(r"layers\.3$", "output"), (r"layers\.[0-2]$", "output")])
    assert cap.output(r"layers\.\d+$").absmax().layers == [f"model.layers.{i}" for i in range(4)]
    assert cap.output(r"layers\.\d+$", exclude="1").absmax().layers == [f"model.layers.{i}" for i in (0, 2, 3)]


# What is left behind.


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = models.llama().train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model.config.use_cache = True
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, module.config.use_cache, torch.is_grad_enabled()))
    )
    if fails:
        model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    sites = [(".", "input"), (r"layers\.\d+$", "output"), ("proj", "weight")]
    if fails:
        with pytest.raises(ZeroDivisionError):
            capture(model, [models.token_batch(1, 8)], sites=sites)
    else:
        capture(model, [models.token_batch(1, 8), models.token_batch(1, 8)], sites=sites)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert model.config.use_cache is True
    assert torch.is_grad_enabled()
    assert set(seen) == {(False, False, False)}
    handle.remove()


@pytest.mark.parametrize("frozen_before", [False, True])
def test_the_garbage_collector_looks_at_no_earlier_object_during_a_pass_and_at_all_of_them_afterwards(
    frozen_before, monkeypatch
):
    model, during = models.llama(), []
    monkeypatch.setattr(collector, "_frozen", False)
    if not frozen_before:
        gc.unfreeze()  # tests/conftest.py has frozen what was there before all tests
    model.register_forward_pre_hook(lambda *_: during.append(gc.get_freeze_count()))
    try:
        capture(model, [models.token_batch(1, 8)], sites=[(r"layers\.\d+$", "output")])
        assert min(during) > 0
        assert (gc.get_freeze_count() > 0) == frozen_before
    finally:
        gc.freeze()


def test_what_is_made_without_collecting_garbage_is_old_afterwards(monkeypatch):
    monkeypatch.setattr(collector, "_frozen", False)
    gc.unfreeze()  # tests/conftest.py has frozen what was there before all tests
    try:
        with collector.uncollected():
            assert not gc.isenabled()
            made = [[] for _ in range(10)]
        young = {id(each) for generation in (0, 1) for each in gc.get_objects(generation)}
        assert (gc.isenabled(), young & set(map(id, made))) == (True, set())
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_a_subject_s_model_is_freed_after_its_pass(llama, tmp_path, monkeypatch):
    made, load = [], in_transformers.load_subject

    def remember(*arguments, **options):
        loaded = load(*arguments, **options)
        loaded.model.circle = [loaded.model]  # only the collector frees it, as it does modules with hooks
        made.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(in_transformers, "load_subject", remember)
    data, memory = Data(num_samples=1, seq_len=8), Memory(device="cpu")
    subject = Subject("x", Model(path=str(llama)), data, memory, tmp_path)
    capture_subject(subject, [Request(r"layers\.\d+$", "output", None, statistics("tokens"))])
    assert [model() for model in made] == [None]


def test_no_activation_outlives_its_forward():
    model = models.llama()
    alive, at_next = [], []

    def remember(module, args, output):
        at_next.append(sum(ref() is not None for ref in alive))
        alive[:] = [weakref.ref(output)]

    model.model.layers[1].mlp.register_forward_hook(remember)
    batches = [models.token_batch(2, 8, seed=i) for i in range(3)]
    cap = capture(model, batches, sites=[("mlp|layers", "output"), ("mlp|layers", "input")])
    gc.collect()
    assert at_next == [0, 0, 0]
    assert alive[0]() is None
    assert len(cap.sites) > 0


@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "operators"])
def test_nothing_of_an_activation_is_kept_by_the_observers(fused):
    from pytest_qsa.captures import ALL_STATISTICS
    from pytest_qsa.engine.reduce.observer import Reducers, StreamObserver

    def root(array):
        return array if array.base is None or not isinstance(array.base, np.ndarray) else root(array.base)

    def memory(value):
        return root(value.numpy() if isinstance(value, torch.Tensor) else value)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        observer = StreamObserver(ALL_STATISTICS | statistics("massive:1:1"), Reducers(fused))
        x = torch.randn(2, 40, 50).to(dtype)
        observer.add(x, [None, torch.arange(7)], [0, 1], 0, token_axis=True)
        rows = [value for values in observer.kept.rows.values() for value in values]
        first, end = x.untyped_storage().data_ptr(), x.untyped_storage().data_ptr() + x.untyped_storage().nbytes()
        window = observer.kept.pooled.get("window")
        pooled = observer.kept.pooled | (vars(window) if window else {})
        arrays = [value for value in pooled.values() if isinstance(value, (np.ndarray, torch.Tensor))]
        kept = [memory(array).ctypes.data for array in [*rows, *arrays]]
        assert not any(first <= address < end for address in kept)
        assert max(array.nbytes for array in rows) <= 8 * 50, "a row keeps one number a token or channel at most"


@pytest.mark.parametrize(
    ("length", "width", "cell"),
    # Equal cells, where the size has a divisor.
    [(7, 5, (1, 1)), (128, 130, (1, 2)), (300, 129, (3, 3)), (131, 576, (2, 6))],
)
def test_a_map_keeps_the_largest_magnitude_of_each_rectangle_of_one_sample(length, width, cell):
    values = torch.randn(3, length, width)
    model = models.Scripted(values)
    wanted = [Request("layers", "output", None, frozenset({HeatMap(1)}))]
    cap = run_pass(model, [models.numbered(model, 0, 2), models.numbered(model, 2)], wanted)
    picture = cap.sites["layers.0", "output"].arrays[HeatMap(1).key]
    tokens, channels = cell
    x = np.abs(values[1].numpy())
    expected = [
        [x[t : t + tokens, c : c + channels].max() for c in range(0, width, channels)] for t in range(0, length, tokens)
    ]
    np.testing.assert_array_equal(picture, np.array(expected))
    assert max(picture.shape) <= 128
    all_equal(Capture.from_bytes(cap.to_bytes()), cap)


def test_padding_is_black_on_a_map():
    model = models.Scripted(torch.ones(1, 4, 3))
    batch = {"input_ids": models.numbered(model), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    wanted = [Request("layers", "output", None, frozenset({HeatMap(0)}))]
    picture = run_pass(model, [batch], wanted).sites["layers.0", "output"].arrays[HeatMap(0).key]
    assert picture.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]


# Batching and sharing.


class Shared(nn.Module):
    """q, k and v read one tensor, which is changed in place and read again; a block's output is the next's input."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "after", "first", "second"):
            setattr(self, name, nn.Identity())

    def forward(self, x, attention_mask=None):
        h = x * 2
        self.q(h), self.k(h), self.v(h)
        h += 1
        self.after(h)
        return self.second(self.first(h * 3) * 1)


SHARED_SITES = [("q|k|v|after|first|second", "input"), ("first|second", "output")]


def samples_of(seed, count, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    x = torch.as_tensor(rng.standard_t(2, (count, 6, 4)), dtype=dtype)
    mask = torch.as_tensor(rng.integers(0, 2, (count, 6)))
    mask[:, 2] = 1
    return x, mask


def split(x, mask, cuts):
    edges = [0, *sorted({cut % len(x) for cut in cuts} - {0}), len(x)]
    return [{"x": x[a:b], "attention_mask": mask[a:b]} for a, b in pairwise(edges)]


@quick
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6), cuts=st.lists(st.integers(0, 5), max_size=4))
def test_the_split_into_batches_changes_no_bit(seed, count, cuts):
    x, mask = samples_of(seed, count)
    whole = capture(Shared(), [{"x": x, "attention_mask": mask}], sites=SHARED_SITES)
    all_equal(whole, capture(Shared(), split(x, mask, cuts), sites=SHARED_SITES))


@quick
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(4)))
def test_the_order_of_batches_changes_no_reduction_that_has_no_order(seed, order):
    x, mask = samples_of(seed, 4)
    batches = split(x, mask, [1, 2, 3])
    one, other = (
        capture(Shared(), chosen, sites=SHARED_SITES).input("q|after")
        for chosen in (batches, [batches[index] for index in order])
    )
    for name, parameters in (
        ("outlier_tokens", {"threshold": 3.0, "reduce": "sum"}),
        ("outlier_ratio", {"reduce": "p95"}),
        ("absmax", {}),
        ("nonfinite", {}),
        ("zero_fraction", {}),
        ("quantile", {"q": 0.7}),
        ("quantile", {"q": 0.3, "signed": True}),
        ("magnitude", {"stat": "median", "reduce": "max"}),
    ):
        np.testing.assert_array_equal(
            getattr(one, name)(**parameters).values, getattr(other, name)(**parameters).values
        )
    for name in ("rms", "std", "kurtosis"):
        np.testing.assert_allclose(getattr(one, name)().values, getattr(other, name)().values, 1e-12)


@quick
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_sites_that_share_a_tensor_have_the_numbers_of_each_by_itself(seed, dtype):
    x, mask = samples_of(seed, 3, dtype)
    batches = split(x, mask, [1])
    together = capture(Shared(), batches, sites=SHARED_SITES)
    for layer, site in together.sites:
        alone = capture(Shared(), batches, sites=[(f"^{layer}$", site)])
        assert_same(together.sites[layer, site], alone.sites[layer, site])


def test_a_shared_tensor_is_reduced_once():
    x, mask = samples_of(0, 2)
    cap = capture(Shared(), split(x, mask, [1]), sites=SHARED_SITES)
    assert cap.sites["q", "input"] is cap.sites["k", "input"] is cap.sites["v", "input"]
    assert cap.sites["first", "output"] is cap.sites["first", "input"]


def test_a_change_in_place_between_two_sites_is_seen():
    x, _ = samples_of(0, 2)
    cap = capture(Shared(), [{"x": x}], sites=SHARED_SITES)
    real = x.double().numpy()
    np.testing.assert_allclose(cap.input("^q$").mean().values, [np.mean(real * 2)], 1e-6)
    np.testing.assert_allclose(cap.input("^after$").mean().values, [np.mean(real * 2 + 1)], 1e-6)


def test_sharing_keeps_what_only_one_of_the_sites_needs():
    from pytest_qsa.captures import Request
    from pytest_qsa.engine.run.run_pass import run_pass

    x, mask = samples_of(0, 3)
    batches = split(x, mask, [2])
    requests = [
        Request("^q$", "input", None, statistics("tokens")),
        Request("^k$", "input", None, statistics("moments", "tokens")),
    ]
    cap = run_pass(Shared(), batches, requests)
    for request in requests:
        alone = run_pass(Shared(), batches, [request])
        layer = request.pattern.strip("^$")
        got, want = cap.sites[layer, "input"], alone.sites[layer, "input"]
        assert want.statistics <= got.statistics
        np.testing.assert_array_equal(got.token_max, want.token_max)
        if "moments" in want:
            np.testing.assert_array_equal(got.moments, want.moments)


class Fickle(nn.Module):
    """b reads a's tensor, another one, or is not called, as the data say."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        h = x * 2
        self.a(h)
        kind = int(x[0, 0, 0])
        if kind == 0:
            self.b(h)
        elif kind == 1:
            self.b(h + 10)
        elif kind == 3:
            self.b(h)
            self.b(h - 50)
        self.c(x * 5)


@quick
@example(kinds=[0, 2], last=False)
@example(kinds=[2, 0], last=False)
@given(kinds=st.lists(st.integers(0, 3), min_size=1, max_size=5), last=st.booleans())
def test_sharing_that_changes_with_the_data_changes_no_number(kinds, last):
    batches = [torch.full((1, 3, 2), float(kind)) for kind in kinds]
    # without a later site the first batch's last call is where the others end, so b may not be called again after it
    pattern = "a|b|c" if last or 3 in kinds else "a|b"
    together = capture(Fickle(), batches, sites=[(pattern, "input")])
    alone = capture(Fickle(), batches, sites=[("b|c", "input")])
    truth = [sample for sample, kind in enumerate(kinds) for _ in range({0: 1, 1: 1, 2: 0, 3: 2}[kind])]
    assert alone.sites["b", "input"].sample.tolist() == truth
    assert_same(together.sites["b", "input"], alone.sites["b", "input"])
    assert together.sites["a", "input"].sample.tolist() == list(range(len(kinds)))


@pytest.mark.parametrize("inner", [torch.inference_mode, torch.no_grad])
def test_a_forward_may_enter_inference_mode_itself(inner):
    class Wrapped(Shared):
        def forward(self, x):
            with inner():
                return super().forward(x.clone())

    x, _ = samples_of(0, 2)
    plain, wrapped = (capture(model, [x], sites=SHARED_SITES) for model in (Shared(), Wrapped()))
    all_equal(plain, wrapped)


def test_the_same_pass_gives_the_same_bits():
    model, batches = models.llama(torch.bfloat16, sink=True), [models.padded_batch([8, 5, 7], bos=True)]
    sites = [(r"layers|norm|lm_head", "output"), ("proj", "weight")]
    all_equal(capture(model, batches, sites=sites), capture(model, batches, sites=sites))


# What a layer may take and return.


class Returns(nn.Module):
    """A layer that wraps its result in whatever `wrap` makes of it."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x)


class Around(nn.Module):
    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        self.call(self.inner, x * 2)


WRAPPINGS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, torch.zeros(3)),
    "list": lambda x: [x],
    "nested": lambda x: ((x, None), None),
    "none first": lambda x: (None, x),
    "integers first": lambda x: (torch.zeros(2, 3, dtype=torch.long), x),
    "dict": lambda x: {"mask": torch.zeros(2, 3), "hidden_states": x},
    "model output": lambda x: BaseModelOutput(last_hidden_state=x),
    "model output with all states": lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x * 0, x)),
    "embeddings": lambda x: {"inputs_embeds": x},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_output_of_a_layer_is_found_in_what_it_returns(wrapping):
    x, _ = samples_of(0, 2)
    model = Around(Returns(WRAPPINGS[wrapping]), lambda inner, h: inner(h))
    got = capture(model, [x], sites=[("inner", "output")]).output("inner").absmax().values
    assert got == [2 * x.double().abs().max().item()]


class Takes(nn.Module):
    def forward(self, *args, **kwargs):
        return None


CALLS = {
    "positional": lambda inner, h: inner(h),
    "after an integer": lambda inner, h: inner(torch.zeros(1, dtype=torch.long), h),
    "keyword": lambda inner, h: inner(hidden_states=h),
    "keyword among others": lambda inner, h: inner(attention_mask=torch.zeros(2, 1, 6, 6), hidden_states=h),
    "keyword of another name": lambda inner, h: inner(ids=torch.zeros(2, 6, dtype=torch.long), features=h),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_input_of_a_layer_is_found_in_how_it_is_called(call):
    x, _ = samples_of(0, 2)
    cap = capture(Around(Takes(), CALLS[call]), [x], sites=[("inner", "input")])
    assert cap.input("inner").absmax().values == [2 * x.double().abs().max().item()]


def test_a_layer_that_is_never_called_is_an_anomaly_that_names_it():
    model = Fickle()
    cap = capture(model, [torch.full((1, 3, 2), 2.0)], sites=[("a|b", "output")])
    with pytest.raises(AnomalyError, match=r"hook at b never fired"):
        cap.output("a|b").absmax()
    assert cap.output("a").absmax().values == [4]


def test_an_embedding_has_no_floating_point_input():
    cap = capture(
        models.llama(), [models.token_batch(1, 4)], sites=[("embed_tokens", "input"), ("embed_tokens", "output")]
    )
    with pytest.raises(AnomalyError, match=r"embed_tokens never fired with a floating-point tensor"):
        cap.input("embed_tokens").absmax()
    assert cap.output("embed_tokens").absmax().values > 0


def test_a_sample_that_is_all_padding_has_no_population():
    x, mask = samples_of(0, 3)
    mask[1] = 0
    cap = capture(Shared(), [{"x": x, "attention_mask": mask}], sites=SHARED_SITES)
    assert cap.sites["q", "input"].sample.tolist() == [0, 2]


@pytest.mark.parametrize("order", [("position_ids", "input_ids"), ("input_ids", "position_ids")])
def test_the_rows_of_a_batch_are_those_of_its_tokens_whatever_its_first_tensor(order):
    batch = {"input_ids": models.token_batch(3, 8), "position_ids": torch.arange(8)[None]}
    cap = capture(models.llama(), [{key: batch[key] for key in order}], sites=[(r"layers\.0$", "output")])
    assert cap.sites["model.layers.0", "output"].sample.tolist() == [0, 1, 2]


def test_a_batch_without_tensors_is_an_error():
    with pytest.raises(InfraError, match=r"\['x'\] holds no tensor"):
        capture(Around(Takes(), CALLS["positional"]), [{"x": 3}], sites=[("inner", "input")])


def test_a_tensor_without_rows_is_an_error_that_says_what_to_do():
    with pytest.raises(InfraError, match=r"inner.*\(5, 4\) has no axis for the 2 samples.*batch_size to 1"):
        capture(Routed(5), [samples_of(0, 2)[0]], sites=[("inner", "input")])


class Routed(nn.Module):
    """An expert: of all tokens of a batch it gets those that a router picks, so that no axis has the samples."""

    def __init__(self, share):
        super().__init__()
        self.inner, self.share = Takes(), share

    def forward(self, x):
        self.inner(x.flatten(0, 1)[: self.share])


def test_tokens_that_were_picked_out_of_several_samples_are_never_shared_out_by_guess():
    with pytest.raises(InfraError, match=r"no axis for the 2 samples"):
        capture(Routed(6), [samples_of(0, 2)[0]], sites=[("inner", "input")])
    one, _ = samples_of(0, 1)
    cap = capture(Routed(4), [one], sites=[("inner", "input")])
    assert cap.input("inner").absmax().values == [one[0, :4].abs().max().double().item()]


def test_a_tensor_that_all_samples_share_belongs_to_each_of_them():
    model = Around(Takes(), lambda inner, h: inner(h[:1] * 0 + torch.arange(6.0)[:, None]))
    one, three = (capture(model, [samples_of(0, count)[0]], sites=[("inner", "input")]) for count in (1, 3))
    assert three.sites["inner", "input"].sample.tolist() == [0, 1, 2]
    assert one.input("inner").rms().values == three.input("inner").rms().values


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (6,)])
def test_a_mask_that_is_no_mask_of_tokens_is_an_error(shape):
    x, _ = samples_of(0, 1)
    with pytest.raises(InfraError, match=r"attention_mask.*\[B, T\]"):
        capture(Shared(), [{"x": x, "attention_mask": torch.zeros(shape)}], sites=SHARED_SITES)


def test_a_layer_whose_dtype_changes_between_calls_is_an_error():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            self.inner(x)
            self.inner(x.half())

    with pytest.raises(InfraError, match=r"float16.*float32|float32.*float16"):
        capture(Both(), [samples_of(0, 1)[0]], sites=[("inner", "output")])


# What is asked for, and errors.


def test_no_batches_are_an_anomaly():
    with pytest.raises(AnomalyError, match="no batches"):
        capture(models.Mlp(), iter([]), sites=[("first", "output")])


def test_a_pattern_without_a_match_names_the_nearest_layers_and_runs_nothing():
    model = models.llama()
    calls, _ = counting(model)
    with pytest.raises(AnomalyError, match=r"no layer matches 'mlp\\\.donw_proj'.*down_proj"):
        capture(model, [models.token_batch(1, 4)], sites=[(r"mlp\.donw_proj", "input"), (r"layers\.0$", "output")])
    assert calls[""] == 0


def test_a_wrong_regex_or_site_is_a_suite_error():
    with pytest.raises(SuiteError, match="not a regular expression"):
        capture(models.Mlp(), [torch.randn(1, 8)], sites=[("(", "output")])
    with pytest.raises(SuiteError, match="unknown site 'outptu'"):
        capture(models.Mlp(), [torch.randn(1, 8)], sites=[("first", "outptu")])


def test_an_unknown_metric_is_an_error_with_the_nearest_name():
    with pytest.raises(SuiteError, match="did you mean 'outlier_tokens'"):
        capture(models.Mlp(), [torch.randn(1, 8)], sites=[("first", "output")], statistics=["outlier_token"])


ENOUGH = {
    "outlier_tokens": [{}, {"positions": "no_sink"}, {"positions": {"skip_first": 2}}],
    "outlier_ratio": [{}, {"positions": "sink"}],
    "magnitude": [{"reduce_dim": -1, "positions": "no_sink"}, {"reduce_dim": -2}, {"reduce_dim": None}],
    "sink_tokens": [{}],
    "massive_activations": [{}],
    "absmax": [{}, {"positions": "no_sink"}],
    "rms": [{}],
    "mean": [{}],
    "std": [{}],
    "kurtosis": [{}],
    "crest_factor": [{}],
    "quantile": [{}, {"signed": True}],
    "zero_fraction": [{}],
    "nonfinite": [{}],
    "headroom": [{}],
}


@pytest.mark.parametrize("name", ENOUGH)
def test_naming_a_metric_is_enough_to_ask_for_it(name):
    model, batches = models.llama(sink=True), [models.token_batch(2, 8, bos=True)]
    pattern = r"layers\.\d+$"
    little = capture(model, batches, sites=[(pattern, "output")], statistics=[name])
    everything = capture(model, batches, sites=[(pattern, "output")])
    for parameters in ENOUGH[name]:
        np.testing.assert_array_equal(
            getattr(little.output(pattern), name)(**parameters).values,
            getattr(everything.output(pattern), name)(**parameters).values,
        )


@pytest.mark.parametrize("wanted", [("magnitude", {}), ("magnitude", {"stat": "top1"}), "magnitude"], ids=str)
def test_a_metric_with_its_defaults_is_enough_at_a_weight_too(wanted):
    cap = capture(models.Mlp(), [torch.randn(2, 8)], sites=[("first", "weight")], statistics=[wanted])
    assert cap.weight("first").magnitude("top1").values > 0


def test_asking_for_what_was_not_measured_says_so():
    cap = capture(models.llama(), [models.token_batch(1, 8)], sites=[(r"layers\.0$", "output")], statistics=["rms"])
    with pytest.raises(NotMeasuredError, match="no statistics 'counts'"):
        cap.output(r"layers\.0$").quantile()
    with pytest.raises(NotMeasuredError, match="input of 0 of the 1 layers"):
        cap.input(r"layers\.0$").absmax()
    with pytest.raises(NotMeasuredError, match="output of 1 of the 4 layers"):
        cap.output(r"layers\.\d$").absmax()
    with pytest.raises(NotMeasuredError, match="massive:50"):
        cap.output(r"layers\.0$").massive_activations(50, 5)
    with pytest.raises(AnomalyError, match="no layer matches"):
        cap.output("nothing").absmax()


def test_exclude_that_leaves_nothing_is_an_anomaly_of_its_own():
    cap = capture(models.Mlp(), [torch.randn(1, 8)], sites=[("first", "output")])
    with pytest.raises(AnomalyError, match="exclude 'fir' leaves none"):
        cap.output("first", exclude="fir").absmax()


def test_the_weight_of_layers_without_one_is_an_anomaly():
    cap = capture(models.Mlp(), [torch.randn(1, 8)], sites=[("act|first", "weight")])
    assert cap.weight("act|first").absmax().layers == ["first"]
    with pytest.raises(AnomalyError, match="none of the 1 layers that 'act' matches owns a weight"):
        cap.weight("act").absmax()


# The file.


@pytest.fixture(scope="module")
def full():
    class Tokenizer:
        def decode(self, ids):
            return f"<{ids[0]}é\u2028>"

    model = models.llama(torch.bfloat16, sink=True)
    batches = [models.padded_batch([8, 5], bos=True), models.token_batch(1, 6)]
    sites = [(r"layers|norm", "input"), (r"layers", "output"), ("proj", "weight")]
    return capture(model, batches, sites=sites, tokenizer=Tokenizer())


def test_a_capture_is_read_as_it_was_written_to_the_last_bit(full, tmp_path):
    full.save(tmp_path / "deep" / "a.qsa")
    loaded = Capture.load(tmp_path / "deep" / "a.qsa")
    all_equal(full, loaded)
    assert (loaded.modules, loaded.blocks, loaded.pieces, loaded.meta) == (
        full.modules,
        full.blocks,
        full.pieces,
        full.meta,
    )
    assert list(loaded.sites) == list(full.sites)
    assert len(loaded.tokens) == len(full.tokens)
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(loaded.tokens, full.tokens, strict=True))
    assert loaded.sinks == full.sinks
    q, k = (loaded.sites[f"model.layers.0.self_attn.{name}_proj", "input"] for name in "qk")
    assert q is k


def test_saving_twice_gives_the_same_bytes(full, tmp_path):
    full.save(tmp_path / "a.qsa")
    full.save(tmp_path / "b.qsa")
    Capture.load(tmp_path / "a.qsa").save(tmp_path / "c.qsa")
    first = (tmp_path / "a.qsa").read_bytes()
    assert first == (tmp_path / "b.qsa").read_bytes() == (tmp_path / "c.qsa").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.qsa", "b.qsa", "c.qsa"]


def test_a_capture_of_a_layer_that_never_ran_survives_the_file(tmp_path):
    cap = capture(Fickle(), [torch.full((1, 3, 2), 2.0)], sites=[("a|b", "output")])
    cap.save(tmp_path / "a.qsa")
    with pytest.raises(AnomalyError, match="never fired"):
        Capture.load(tmp_path / "a.qsa").output("b").absmax()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_an_infrastructure_error(full, tmp_path, share):
    full.save(tmp_path / "a.qsa")
    content = (tmp_path / "a.qsa").read_bytes()
    (tmp_path / "a.qsa").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InfraError, match=r"a\.qsa"):
        Capture.load(tmp_path / "a.qsa")


def foreign_files():
    from safetensors.torch import save

    weights = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    return {
        "text": b"hello, world" * 10,
        "weights": save(weights),
        "weights in float32": save({"w": torch.zeros(2)}),
        "another version": save({"w": torch.zeros(2)}, {"qsa": '{"format": "qsa-capture/0"}'}),
        "no header": save({"w": torch.zeros(2)}, {"qsa": '{"format": "qsa-capture/1"}'}),
        "not a mapping": save({"w": torch.zeros(2)}, {"qsa": "[]"}),
        "not JSON": save({"w": torch.zeros(2)}, {"qsa": "{"}),
    }


@pytest.mark.filterwarnings("ignore:.*has no checksum")
@pytest.mark.parametrize("kind", foreign_files())
def test_a_foreign_file_is_an_infrastructure_error(tmp_path, kind):
    (tmp_path / "a.qsa").write_bytes(foreign_files()[kind])
    with pytest.raises(InfraError, match=r"a\.qsa"):
        Capture.load(tmp_path / "a.qsa")


@pytest.mark.parametrize("name", ["missing.qsa", "."])
def test_a_path_that_is_no_file_is_an_infrastructure_error(tmp_path, name):
    with pytest.raises(InfraError):
        Capture.load(tmp_path / name)


def test_a_capture_whose_arrays_were_lost_is_an_infrastructure_error(full, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save

    full.save(tmp_path / "a.qsa")
    with safe_open(tmp_path / "a.qsa", framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys() if name != "0/sample"}  # noqa: SIM118
    (tmp_path / "a.qsa").write_bytes(save(arrays, metadata))
    with pytest.raises(InfraError, match=r"a\.qsa"):
        Capture.load(tmp_path / "a.qsa")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batches": torch.ones(2, 8)}, r"a list of batches, not a tensor of shape \(2, 8\): wrap it"),
        ({"batches": {"input_ids": torch.ones(2, 8)}}, "a list of batches, not a dict: wrap it"),
        ({"batches": None}, "a list of batches, not None"),
        ({"batches": [(torch.ones(2, 8), 1)]}, r"batch 0 is a tuple.*DataLoader.*batch\[0\]"),
        ({"batches": [torch.ones(2, 8), 3]}, "batch 1 is an int"),
        ({"batches": [torch.tensor(1.0)]}, "batch 0 is a tensor without dimensions"),
        ({"model": "checkpoints/my-model"}, "model is a torch.nn.Module, not a str: load it"),
        ({"reference": 3}, "reference is a torch.nn.Module, not an int"),
        ({"tokenizer": "my-model"}, "tokenizer is one that is loaded"),
        ({"statistics": 5}, "statistics is .* not an int"),
        ({"sites": "layers"}, "sites is a list of pairs.*not a str"),
        ({"sites": ["layers"]}, "sites has 'layers', where a pair"),
        ({"sites": [(0, "output")]}, r"sites has \(0, 'output'\), where a pair"),
    ],
)
def test_an_argument_of_another_type_is_named(change, text):
    """A tensor in the place of a list would run row by row, and its numbers would look right."""
    arguments = {"model": nn.Linear(8, 4), "batches": [torch.ones(2, 8)], "sites": [(".", "output")]} | change
    with pytest.raises(TypeError, match=text):
        capture(**arguments)


def test_a_pattern_without_a_match_names_all_layers_of_a_small_model():
    """`qsa layers` can't list a model that exists in Python alone."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    with pytest.raises(AnomalyError, match=r"^no layer matches 'mlp'; the model has 0, 1$"):
        capture(model, [torch.ones(2, 8)], sites=[("mlp", "output")])
