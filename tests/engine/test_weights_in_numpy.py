"""The engine's reductions of weights against numpy's, which read a checkpoint's files a few rows at a time."""

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import ALL_STATISTICS, SIGNED_COUNTS, Statistic
from pytest_qsa.checkpoint import Files, Folder, capture_weights
from pytest_qsa.checkpoint.weight_statistics import WEIGHT_REDUCTIONS, WeightRows, reduced
from pytest_qsa.engine.reduce.observer import Reducers, StreamObserver
from pytest_qsa.engine.reduce.pairs import powers_of
from pytest_qsa.engine.reduce.reductions import REDUCTIONS
from support import models
from support.captures import statistics

GRIDS = [f"quantized:{s}:{by}" for s in ("int8", "int4", "fp8_e4m3") for by in ("token:0", "channel:0", "group:48")]
STATISTICS = ALL_STATISTICS | statistics("channel_counts", "massive:0.5:2", "features:1", "map:0", "map:1", *GRIDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = ["normal", "zeros", "nan", "inf", "vector", "two"]


def weight_of(special, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 200, generator=generator) * torch.rand(300, 1, generator=generator)
    weight[5] = 0
    if special == "zeros":
        weight.zero_()
    if special in ("nan", "inf"):
        weight[17, 3] = float(f"-{special}")
    return {"vector": weight.flatten()[:777], "two": weight[:2, :1]}.get(special, weight).to(dtype)


def in_numpy(weight, wanted, other=None, step=37):
    """Reduce a tensor as if its rows were read from a file, `step` at a time."""
    x, y = (None if each is None else np.atleast_2d(each.float().numpy()) for each in (weight, other))
    name = str(weight.dtype).removeprefix("torch.")

    def rows():
        for at in range(0, len(x), step):
            yield WeightRows(x[at : at + step], at, name, None if y is None else y[at : at + step])

    return reduced(wanted, rows, x.shape, matrix=weight.dim() == 2)


def by_the_engine(weight, wanted, *, fused):
    observer = StreamObserver(wanted, Reducers(fused))
    observer.add(weight[None], [None], [0], 0, token_axis=weight.dim() == 2)
    return observer.numbers(wanted)


@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "operators"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", SPECIAL)
def test_every_statistic_of_a_weight_is_that_of_numpy(special, dtype, fused):
    for wanted in (STATISTICS, STATISTICS - {SIGNED_COUNTS}):
        weight = weight_of(special, dtype)
        ours, theirs = in_numpy(weight, wanted), by_the_engine(weight, wanted, fused=fused)
        (arrays, header), (others, other_header) = ours.to_arrays(), theirs.to_arrays()
        assert header == other_header
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            assert (array.dtype, array.shape) == (others[name].dtype, others[name].shape), name
            # torch's operators sum squares in float32; all else is equal, but for the order of float64 sums.
            rtol = 2e-5 if name == "moments" and not fused else 1e-12 if array.dtype == np.float64 else 0
            np.testing.assert_allclose(others[name], array, rtol, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", SPECIAL)
def test_the_error_of_every_row_is_that_of_numpy(special, dtype):
    weight = weight_of(special, dtype)
    original = weight + (torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.01).to(dtype)
    powers = in_numpy(weight, statistics("error"), original).error
    for fused, rtol in ((False, 1e-6), (True, 2e-5)):  # sums of float64, rounded once, and of float32
        x, y = (each if each.dim() == 2 else each[None] for each in (original, weight))
        np.testing.assert_allclose(powers_of(x, y, None, fused=fused), powers, rtol, 1e-12)


def test_numpy_has_a_reduction_of_all_that_the_engine_reduces():
    # the error is a pair's in the engine, the factors of groups are of the files alone, and weights have no positions
    assert WEIGHT_REDUCTIONS.keys() - {"error", "gain"} == REDUCTIONS.keys() - {"range"}


@pytest.mark.parametrize("text", sorted(map(str, STATISTICS)))
def test_one_statistic_alone_gives_the_numbers_that_it_gives_among_others(text):
    wanted = frozenset({Statistic.parse(text)})
    weight = weight_of("normal", torch.float32)
    alone, among = (
        in_numpy(weight, wanted, step=1000).arrays,
        in_numpy(weight, STATISTICS - {SIGNED_COUNTS} | wanted).arrays,
    )
    for name in alone.keys() - {"extremes"}:
        np.testing.assert_allclose(alone[name], among[name], rtol=1e-12)


def loaded_and_read(folder, model, *wanted):
    """Return the numbers of a model's weights by the engine, and of its files by numpy, under the model's names."""
    made = capture(model, [torch.zeros(1, 4, dtype=torch.long)], sites=[(".", "weight")], statistics=list(wanted))
    read = capture_weights(Files(Folder(folder)), made.plan, modules=made.modules)
    return made, read


@pytest.mark.parametrize("kind", models.MIXTURES)
def test_experts_have_the_same_names_and_numbers_in_files_as_in_a_loaded_model(tmp_path, kind):
    models.mixture(kind).save_pretrained(tmp_path)
    model = type(models.mixture(kind)).from_pretrained(tmp_path)
    made, read = loaded_and_read(tmp_path, model, "rms", "absmax")
    assert [site for site in made.sites if ".experts." in site[0]]
    assert list(read.sites) == list(made.sites)
    for metric in ("rms", "absmax"):
        ours, theirs = (getattr(each.weight("."), metric)().values for each in (read, made))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("form", ["float", "int8", "int4", "fp8 by channel", "torchao int8 by group"])
def test_files_give_the_numbers_of_the_loaded_weights(quantized, form):
    from transformers import AutoModelForCausalLM

    made, read = loaded_and_read(
        quantized[form], AutoModelForCausalLM.from_pretrained(quantized[form]), "rms", "absmax"
    )
    assert list(read.sites) == list(made.sites)
    for metric in ("rms", "absmax"):
        ours, theirs = (getattr(each.weight("."), metric)().values for each in (read, made))
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)
