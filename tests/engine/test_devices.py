"""The pass on an accelerator: nothing in it waits for the device, and its numbers are those of the CPU.

A machine without one runs the same operators on tensors of the meta device, which have no values to wait for, and the
kernels for CUDA by Triton's interpreter; one with CUDA runs them there.
"""

import contextlib
import copy
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytest_qsa import capture
from pytest_qsa.captures import ALL_STATISTICS, HeatMap, Request
from pytest_qsa.engine import ranks
from pytest_qsa.engine.load.batches import rows_of
from pytest_qsa.engine.modules import blocks_of, layers_of, run_batch
from pytest_qsa.engine.reduce.observer import Reducers, StreamObserver
from pytest_qsa.engine.reduce.pairs import cuda_powers, cuda_scores, powers_of, scores_of
from pytest_qsa.engine.reduce.storage import Transfer
from pytest_qsa.engine.reference.pair_statistics import PairStatistics, ReferenceTensor
from pytest_qsa.engine.run.participant import Forward
from pytest_qsa.engine.run.run_pass import wanted_sites
from pytest_qsa.engine.run.site_statistics import SiteStatistics, hooked
from support import models, oracle
from support.captures import statistics
from support.models import damaged

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
HERE = [CUDA] if torch.cuda.is_available() else []
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STATISTICS = ALL_STATISTICS | statistics(
    "massive:1:4", "quantized:fp8_e4m3:group:16", "quantized:int8:token:0", "features:1.5", "channel_counts", "map:0"
)


KEPT = [
    (5, torch.int32, (5,)), (1, torch.float64, ()), (6, torch.float32, (2, 3)), (0, torch.int64, (0,)),
    (40, torch.int64, (8, 5)), (3, torch.int16, (3, 1)),
]  # fmt: skip


class Unhurried(TorchDispatchMode):
    """Fails where a value is asked for, or where a tensor of one device meets one of another."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().partition(".")[0]
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        out = operator(*args, **(kwargs or {}))
        before, after = (
            {leaf.device for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.dim()}
            for values in ((args, kwargs), out)
        )
        if name in ("aten::_to_copy", "aten::copy_"):
            assert before == {CPU} or CPU not in after, "brought to the host"
        else:
            assert len(before | after) <= 1, f"{name} of tensors on {before}"
        return out


@contextlib.contextmanager
def unhurried(device):
    """Let nothing wait for the device."""
    with Unhurried():
        if device == CUDA:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some versions of torch say that this mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if device == CUDA:
                torch.cuda.set_sync_debug_mode("default")


def observed(x, keep, statistics=STATISTICS, reducers=None):
    observer = StreamObserver(statistics, reducers or Reducers(fused=x.device.type == "cuda"))
    observer.add(x, keep, list(range(len(x))), 0, token_axis=x.dim() == 3)
    observer.add(x, [None] * len(x), list(range(len(x), 2 * len(x))), 0, token_axis=x.dim() == 3)
    return observer


@pytest.fixture(params=[META, *HERE], ids=str)
def elsewhere(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 24), (2, 48)])
def test_no_reduction_waits_for_the_device(elsewhere, dtype, shape):
    x = torch.ones(shape, dtype=dtype, device=elsewhere)
    keep = [torch.arange(3, device=elsewhere) if len(shape) == 3 else None, None]
    with unhurried(elsewhere):
        observer = observed(x, keep)
        observer.reducers.finish()
    assert {tensor.device for rows in observer.kept.rows.values() for tensor in rows} == {elsewhere}
    assert {tensor.device for tensor in observer.kept.pooled.values()} == {elsewhere}


def test_no_hook_waits_for_the_device(elsewhere):
    model = models.llama(torch.bfloat16, num_hidden_layers=1).to(elsewhere)
    requests = tuple(Request("", site, statistics=STATISTICS) for site in ("input", "output"))
    modules = layers_of(model)
    wanted = wanted_sites(modules, blocks_of(model), requests)
    statistics = SiteStatistics(wanted, modules, may_stop=False, fused=elsewhere == CUDA)
    batch = models.padded_batch([9, 5])
    statistics.forward = Forward(batch, rows_of(batch, 0), first=True)
    ids = torch.zeros(2, 9, dtype=torch.int64, device=elsewhere)
    observe = statistics.observe

    def watched(*args, **kwargs):
        with unhurried(elsewhere):
            observe(*args, **kwargs)

    statistics.observe = watched
    with hooked(statistics), torch.no_grad():
        run_batch(model, ids, elsewhere)
    assert len(statistics.observers) > 10


@pytest.mark.parametrize("statistic", ["error", "channel_error:all", "local:4"])
def test_no_comparison_waits_for_the_device(elsewhere, statistic):
    site, module = ("layer", "output"), torch.nn.Linear(24, 24, bias=False, device=elsewhere)
    x, y = (torch.ones(2, 9, 24, device=elsewhere) for _ in range(2))
    pairs = PairStatistics(
        {site: statistics(statistic)}, {"layer": module}, lambda positions, counting, sample, layer: counting
    )
    rows = rows_of(models.padded_batch([9, 5]), 0)
    with torch.no_grad(), unhurried(elsewhere):
        pairs.compare(rows, site, 0, ReferenceTensor(x, x), y)
    computed = [t for row in pairs.compared[site].rows for name, t in row.items() if name != "local_rows"]
    assert {tensor.device for tensor in computed} == {elsewhere}


def test_no_score_of_predictions_waits_for_the_device(elsewhere):
    logits = torch.ones(9, 100, device=elsewhere, dtype=torch.bfloat16)
    following = torch.zeros(9, dtype=torch.int64, device=elsewhere)
    with unhurried(elsewhere):
        assert scores_of(logits, logits, following).device == elsewhere


class ForCuda(Reducers):
    """Reducers that are the kernels for CUDA, wherever the tensor is."""

    def _make(self, x):
        from pytest_qsa.engine.reduce.cuda import CudaReducer

        return CudaReducer()


@pytest.fixture(scope="module")
def compiled():
    """Return the device that the kernels for CUDA run on: CUDA, or the CPU by Triton's interpreter (conftest.py)."""
    return HERE[0] if HERE else CPU


def assert_same(here, there):
    assert here.keys() == there.keys()
    for name, array in there.items():
        assert (here[name].dtype, here[name].shape) == (array.dtype, array.shape), name
        tolerance = 1e-5 if name == "moments" or name.startswith("quantized") else 0
        np.testing.assert_allclose(here[name], array, tolerance, 1e-9, err_msg=name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of ∞ − ∞
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", models.SPECIAL)
def test_the_kernel_for_cuda_keeps_the_numbers_of_the_operators(compiled, dtype, special):
    x = models.special_rows(10, special)
    keep = [None] * 10
    if x.dim() == 3:
        keep[1], keep[2] = torch.arange(1, x.shape[1]), torch.tensor([0])
    there = [None if kept is None else kept.to(compiled) for kept in keep]
    kernel = observed(x.to(dtype).to(compiled), there, reducers=ForCuda()).numbers(STATISTICS).to_arrays()[0]
    assert_same(kernel, observed(x.to(dtype), keep).numbers(STATISTICS).to_arrays()[0])


def test_rows_of_many_shapes_wait_for_others_of_their_shape(compiled):
    rows = [torch.randn(1, 3 + index % 14, 4, device=compiled).bfloat16() for index in range(40)]
    reducers = ForCuda()
    observers = [StreamObserver(STATISTICS - {HeatMap(0)}, how) for how in (reducers, Reducers(fused=False))]
    for index, row in enumerate(rows):
        for observer in observers:
            observer.add(row, [None], [index], 0, token_axis=True)
    assert_same(*(observer.numbers(STATISTICS).to_arrays()[0] for observer in observers))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 40), (2, 3000), (2, 1)])
def test_the_kernels_for_cuda_compare_as_the_operators_do(compiled, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    y = (x + torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1).to(dtype).to(compiled)
    x = x.to(dtype).to(compiled)
    torch.testing.assert_close(cuda_powers(x, y), powers_of(x, y, None, fused=False), rtol=2e-6, atol=1e-7)
    following = torch.arange(-1, shape[0] - 1, device=compiled).clamp(max=shape[1] - 1)
    for reference in (x, None):
        plain = scores_of(y, reference, following, fused=False)
        torch.testing.assert_close(cuda_scores(y, reference, following), plain, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of ∞ − ∞
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_on_cuda(compiled, poison):
    x, y = torch.randn(3, 40, device=compiled), torch.randn(3, 40, device=compiled)
    y[1, 7] = poison
    assert (~cuda_powers(x, y)[:, 1].isfinite()).tolist() == [False, True, False]
    scores = cuda_scores(y, x, torch.tensor([0, 1, 2], device=compiled))
    assert (~scores[:, 2].isfinite()).tolist() == [False, True, False]


@pytest.fixture(params=[CPU, *HERE], ids=str)
def device(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_keeps_the_numbers_of_the_operators(device, dtype):
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 24)
    x[1, 2, 3], x[0, 5] = float("inf"), 0
    keep = [None, torch.arange(1, 30)]
    here = observed(x.to(dtype).to(device), [None, keep[1].to(device)]).numbers(STATISTICS).to_arrays()[0]
    there = observed(x.to(dtype), keep).numbers(STATISTICS).to_arrays()[0]
    assert_same(here, there)


def test_a_capture_on_a_device_says_what_the_activations_say(device):
    model = models.llama(torch.bfloat16, sink=True).to(device)
    batches = [models.padded_batch([12, 7], bos=True), models.padded_batch([12, 12], seed=1, bos=True)]
    cap = capture(model, batches, sites=[(r"layers\.\d$", "output"), ("down_proj$", "input"), ("q_proj$", "weight")])
    site = cap.output(r"layers\.2$")
    populations = models.record(model, batches, "model.layers.2", "output", mask="attention_mask")
    assert site.outlier_tokens(threshold=6, positions="all").values == max(
        oracle.outlier_tokens(x, 6) for x in populations
    )
    assert site.magnitude("median", reduce="max").values == max(oracle.magnitude(x, "median") for x in populations)
    assert site.absmax().values == oracle.absmax(populations)
    np.testing.assert_allclose(site.rms().values, oracle.rms(populations), 1e-6)


def test_a_comparison_on_a_device_is_that_of_the_cpu(device):
    model = models.llama(torch.bfloat16, num_hidden_layers=2)
    sites = [("_proj$", "output"), (r"layers\.\d$", "output"), ("_proj$", "weight"), ("", "logits")]
    batches = [models.padded_batch([12, 7], bos=True), models.padded_batch([12, 12], seed=1, bos=True)]
    one, other = (
        capture(damaged(model).to(place), batches, sites=sites, reference=copy.deepcopy(model).to(place))
        for place in (CPU, device)
    )
    for name, pattern, site in (
        ("sqnr", "_proj$", "output"),
        ("cosine", r"layers\.\d$", "output"),
        ("weight_sqnr", "q_proj$", "weight"),
    ):
        here, there = (getattr(cap.select(pattern, site), name)().values for cap in (one, other))
        np.testing.assert_allclose(here, there, rtol=0.05 if site == "output" else 1e-5)
    np.testing.assert_allclose(
        one.logits().kl_divergence("mean").values, other.logits().kl_divergence("mean").values, rtol=0.1
    )


def test_what_a_pass_has_kept_comes_to_the_host_together(device, monkeypatch):
    monkeypatch.setattr("pytest_qsa.engine.reduce.storage.BYTES_AT_ONCE", 100)
    kept = [torch.arange(n, dtype=kind).reshape(shape).to(device) for n, kind, shape in KEPT]
    fetch = Transfer(kept)
    if device == CPU:  # where nothing has to be brought
        for group in (kept[:3], kept[4:]):
            fetch._copy(group)
    later = torch.ones(3, device=device)
    for tensor in [*kept, later]:
        values = fetch(tensor)
        assert values.shape == tensor.shape
        np.testing.assert_array_equal(values, tensor.cpu().numpy())


def test_ranks_share_the_devices_there_are(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    chosen = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        chosen += [ranks._backend(devices) for devices in (0, 2, 4)]
    assert chosen == ["gloo", "gloo", "nccl"] * 3
    assert taken == [0, 0, 1, 1, 0, 2]
