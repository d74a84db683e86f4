"""Attention sinks: found where they are, nowhere else; and what `positions` does with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import TOKENS, Sinks, SiteNumbers, find_sinks
from pytest_qsa.captures.sinks import Sink
from pytest_qsa.common.errors import AnomalyError
from support import models, oracle

SAMPLES, LENGTH, WIDTH = 2, 9, 6


def script(layers=8, *, sinks=(), samples=SAMPLES, length=LENGTH, seed=0):
    """Return outputs [N, T, C] of each layer; sinks are (layer, sample, position, channel, value)."""
    rng = np.random.default_rng(seed)
    values = [rng.uniform(0.5, 1.0, (samples, length, WIDTH)).astype(np.float32) for _ in range(layers)]
    for layer, sample, position, channel, value in sinks:
        values[layer][sample, position, channel] = value
    return values


def captured(values, mask=None, statistics="all"):
    model = models.Scripted(*map(torch.as_tensor, values))
    ids = models.numbered(model)
    batch = ids if mask is None else {"input_ids": ids, "attention_mask": torch.as_tensor(mask)}
    return capture(model, [batch], sites=[("layers", "output")], statistics=statistics)


def spots(cap):
    return [(sink.sample, sink.position, sink.channel) for sink in cap.sinks.found]


def median_of(x):
    return oracle.lower_median(oracle.token_maxima(x))


def test_a_sink_is_found_with_its_layers_and_its_ratio():
    values = script(sinks=[(layer, 0, 0, 3, -200.0 - layer) for layer in (2, 3, 5)])
    cap = captured(values)
    (sink,) = cap.sinks.found
    assert (sink.sample, sink.position, sink.channel) == (0, 0, 3)
    assert sink.layers == ("layers.2", "layers.3", "layers.5")
    np.testing.assert_allclose(sink.ratio, max((200.0 + i) / median_of(values[i][0]) for i in (2, 3, 5)), 1e-6)
    assert "position 0" in cap.sinks.summary()
    assert "channel 3" in cap.sinks.summary()


def test_a_quarter_of_the_blocks_is_enough_and_less_is_not():
    assert spots(captured(script(8, sinks=[(i, 0, 0, 3, 300.0) for i in (1, 6)]))) == [(0, 0, 3)]
    assert spots(captured(script(8, sinks=[(1, 0, 0, 3, 300.0)]))) == []
    assert spots(captured(script(9, sinks=[(i, 0, 0, 3, 300.0) for i in (1, 6)]))) == []


def block(*calls):
    """Return the numbers of a block that is called so often for one sample. A call: the largest |x| of each token."""
    tokens = np.array(calls, dtype=np.float32)
    zeros = np.zeros(len(calls), np.int32)
    return SiteNumbers(
        dtype="float32",
        shape=(WIDTH,),
        token_axis=True,
        statistics=frozenset({TOKENS}),
        sample=zeros,
        call=np.arange(len(calls), dtype=np.int32),
        lengths=zeros.astype(np.int64) + tokens.shape[1],
        arrays={
            "token_max": tokens.ravel(),
            "peaks": tokens.argmax(axis=1).astype(np.int32)[:, None],
            "peak_channels": zeros[:, None] + 3,
        },
    )


def test_a_block_that_is_called_twice_for_a_sample_counts_once():
    loud, plain = [300.0, 1.0, 1.0], [1.0, 1.0, 1.0]
    others = {f"layers.{index}": block(plain, plain) for index in range(2, 8)}
    once = {"layers.0": block(loud, loud), "layers.1": block(plain, plain), **others}
    assert find_sinks(once).found == ()
    (sink,) = find_sinks({**once, "layers.1": block(plain, loud)}).found
    assert sink.layers == ("layers.0", "layers.1")


def test_a_token_of_zeros_is_part_of_the_median():
    blocks = {"layers.0": block([0.0, 1.0, 3.0, 100.0])}  # the lower median is 1; without the zero it would be 3
    assert [sink.ratio for sink in find_sinks(blocks).found] == [100.0]


def sinks_of(*places):
    """Return the sinks of the first sample at these places: trunk and position."""
    sinks = [Sink(trunk, 0, position, 3, (f"{trunk}.0",), 300.0) for trunk, position in places]
    return Sinks(tuple(sinks), searched=True, trunks=tuple(dict.fromkeys(trunk for trunk, _ in places)))


def test_of_trunks_in_one_another_the_innermost_has_the_sinks_of_a_layer():
    for places in ((("model.layers", 1), ("model.tower.layers", 2)), (("model.tower.layers", 2), ("model.layers", 1))):
        sinks = sinks_of(*places)
        assert np.flatnonzero(sinks.mask(0, 4, "model.tower.layers.0.mlp")).tolist() == [2]
        assert np.flatnonzero(sinks.mask(0, 4, "model.layers.0.mlp")).tolist() == [1]
        assert np.flatnonzero(sinks.mask(0, 4, "lm_head")).tolist() == [1, 2]


def test_a_sink_behind_the_end_of_a_shorter_call_masks_nothing_there():
    assert np.flatnonzero(sinks_of(("model.layers", 1), ("model.layers", 6)).mask(0, 4, "lm_head")).tolist() == [1]


def test_the_channel_has_to_be_the_same_in_those_layers():
    assert spots(captured(script(8, sinks=[(1, 0, 0, 3, 300.0), (6, 0, 0, 4, 300.0)]))) == []


def test_the_position_and_the_sample_have_to_be_the_same_too():
    assert spots(captured(script(8, sinks=[(1, 0, 0, 3, 300.0), (6, 0, 1, 3, 300.0)]))) == []
    assert spots(captured(script(8, sinks=[(1, 0, 0, 3, 300.0), (6, 1, 0, 3, 300.0)]))) == []


def test_a_sink_is_found_anywhere_and_in_every_sample():
    injected = [(i, sample, position, 2, 500.0) for i in range(8) for sample, position in ((0, 0), (0, 7), (1, 4))]
    assert sorted(spots(captured(script(8, sinks=injected)))) == [(0, 0, 2), (0, 7, 2), (1, 4, 2)]


def test_a_sink_has_to_be_above_64_medians():
    values = script(4)
    for layer in values:
        layer[:] = 1.0
        layer[0, 0, 3] = 64.0
    assert spots(captured(values)) == []
    for layer in values:
        layer[0, 0, 3] = 64.1
    assert spots(captured(values)) == [(0, 0, 3)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_sink_and_no_part_of_the_median(side):
    mask = np.ones((SAMPLES, LENGTH), dtype=int)
    padding = slice(0, 6) if side == "left" else slice(3, LENGTH)
    mask[0, padding] = 0
    first = int(np.flatnonzero(mask[0])[0])
    values = script(4, sinks=[(i, 0, first, 3, 90.0) for i in range(4)])
    for layer in values:
        layer[0, padding] = 1e6
    assert spots(captured(values, mask)) == [(0, first, 3)]


def test_a_llama_with_a_massive_first_token_has_one_sink_a_sequence():
    model = models.llama(sink=True)
    batches = [models.token_batch(2, 12, bos=True), models.token_batch(1, 12, seed=5)]
    cap = capture(model, batches, sites=[(r"down_proj", "input")], statistics=["outlier_tokens"])
    assert spots(cap) == [(0, 0, models.SINK_CHANNEL), (1, 0, models.SINK_CHANNEL)]
    assert cap.output(r"layers\.\d+$").sink_tokens().values.tolist() == [1, 1, 1, 1]


def test_a_dead_block_and_a_nan_hide_no_sink():
    values = script(4, sinks=[(i, 0, 0, 3, 300.0) for i in (1, 2)])
    values[0][:] = 0.0
    values[3][0, 5, 1] = float("nan")
    assert spots(captured(values)) == [(0, 0, 3)]


def test_as_many_sinks_are_found_as_a_population_keeps_peaks_and_at_least_16():
    injected = [(i, 0, position, 1, 400.0) for i in range(4) for position in range(0, 64, 4)]
    assert len(spots(captured(script(4, sinks=injected, length=80)))) == 16
    injected = [(i, 0, position, 1, 400.0) for i in range(4) for position in range(0, 640, 32)]
    assert len(spots(captured(script(4, sinks=injected, length=640)))) == 20


# sink_tokens


def test_sink_tokens_says_count_channel_and_ratio_of_each_layer():
    values = script(4, sinks=[(i, 0, 0, 3, 300.0 * (i + 1)) for i in (1, 2)])
    site = captured(values).output("layers")
    assert site.sink_tokens().values.tolist() == [0, 1, 1, 0]
    assert site.sink_tokens("channel").values[1:3].tolist() == [3, 3]
    want = [300.0 * (i + 1) / median_of(values[i][0]) for i in (1, 2)]
    np.testing.assert_allclose(site.sink_tokens("ratio").values[1:3], want, 1e-6)


def test_without_a_sink_the_count_is_zero():
    site = captured(script(4)).output("layers")
    assert site.sink_tokens().values.tolist() == [0] * 4
    assert site.sink_tokens("channel").values.tolist() == [-1] * 4
    assert site.sink_tokens("ratio").values.tolist() == [0] * 4


def test_every_sequence_keeping_its_sink_can_be_asserted():
    site = captured(script(4, sinks=[(i, sample, 0, 3, 300.0) for i in range(4) for sample in (0, 1)])).output("layers")
    assert (site.sink_tokens() == 1) is True
    one = captured(script(4, sinks=[(i, 0, 0, 3, 300.0) for i in range(4)])).output("layers")
    assert one.sink_tokens(reduce="sum").values.tolist() == [1] * 4


# positions


@pytest.fixture(scope="module")
def with_sinks():
    values = script(4, sinks=[(i, sample, 0, 3, 300.0) for i in range(4) for sample in (0, 1)])
    for layer in values:
        layer[1, 5, 2] = 90.0  # an outlier token that is in one layer only a sink's size, and no sink
    values[1][1, 5, 2], values[2][1, 5, 2], values[3][1, 5, 2] = 2.0, 3.0, 4.0
    values[0][1, 5, 1], values[0][1, 5, 2] = 1.0, 2.5
    return values, captured(values).output("layers")


SELECT = {
    "all": slice(None),
    "no_sink": slice(1, None),
    "sink": slice(0, 1),
    "skip_first:3": slice(3, None),
}
WHERE = {**{name: name for name in ("all", "no_sink", "sink")}, "skip_first:3": {"skip_first": 3}}


@pytest.mark.parametrize("where", SELECT)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("outlier_ratio", {}),
        ("outlier_tokens", {"threshold": 2.0}),
        ("magnitude", {"stat": "median"}),
        ("magnitude", {"stat": "top1"}),
    ],
)
def test_positions_change_the_tokens_and_the_median(with_sinks, where, name, parameters):
    values, site = with_sinks
    got = getattr(site, name)(**parameters, positions=WHERE[where], reduce="sum").values
    want = [oracle.metric(name, [x[SELECT[where]] for x in layer], "sum", **parameters) for layer in values]
    np.testing.assert_allclose(got, want, 1e-6)


@pytest.mark.parametrize("where", SELECT)
def test_absmax_takes_positions(with_sinks, where):
    values, site = with_sinks
    got = site.absmax(positions=WHERE[where]).values
    np.testing.assert_allclose(got, [oracle.absmax([x[SELECT[where]] for x in layer]) for layer in values], 1e-6)


def test_the_sinks_of_the_blocks_hold_at_every_other_site():
    model = models.llama(sink=True)
    batches = [models.token_batch(3, 12, bos=True)]
    pattern, layer = r"layers\.1\.mlp\.down_proj$", "model.layers.1.mlp.down_proj"
    cap = capture(model, batches, sites=[(pattern, "input")], statistics=["magnitude", "absmax"])
    rest = [x[1:] for x in models.record(model, batches, layer, "input")]
    np.testing.assert_allclose(
        cap.input(pattern).magnitude("median", positions="no_sink").values,
        [oracle.metric("magnitude", rest, stat="median")],
        1e-6,
    )
    np.testing.assert_allclose(cap.input(pattern).absmax(positions="no_sink").values, [oracle.absmax(rest)], 1e-6)


def test_sink_positions_without_a_sink_are_an_anomaly():
    series = captured(script(4)).output("layers").outlier_ratio(positions="sink")
    with pytest.raises(AnomalyError, match="no token of sample 0 counts under positions: sink"):
        _ = series <= 100


@pytest.mark.parametrize("side", ["left", "right"])
def test_skip_first_counts_from_the_first_token_that_is_no_padding(side):
    values = script(1, samples=1)
    mask = np.ones((1, LENGTH), dtype=int)
    mask[0, slice(0, 4) if side == "left" else slice(5, LENGTH)] = 0
    real = values[0][0][mask[0].astype(bool)]
    got = captured(values, mask).output("layers").magnitude("top1", positions={"skip_first": 2}).values
    np.testing.assert_allclose(got, [oracle.magnitude(real[2:])], 1e-6)


def test_sinks_that_nobody_could_look_for_are_no_pass():
    model = models.albert()  # one block that is called three times: no list of blocks
    site = capture(model, [models.token_batch(2, 8)], sites=[("ffn$", "input")]).input("ffn$")
    with pytest.raises(AnomalyError):
        _ = site.sink_tokens() <= 1
    with pytest.raises(AnomalyError):
        _ = site.outlier_ratio(positions="no_sink") <= 1e9


class TwoTrunks(torch.nn.Module):
    """An encoder whose first token is a sink, and a decoder that has none."""

    def __init__(self):
        super().__init__()
        self.encoder = models.Scripted(
            *map(torch.as_tensor, script(4, sinks=[(i, s, 0, 3, 300.0) for i in range(4) for s in (0, 1)]))
        )
        self.decoder = models.Scripted(*map(torch.as_tensor, script(4, seed=1)))

    def forward(self, input_ids):
        self.encoder(input_ids)
        return self.decoder(input_ids)


def test_the_sinks_of_one_trunk_do_not_mask_the_tokens_of_another():
    model = TwoTrunks()
    cap = capture(model, [models.numbered(model.encoder)], sites=[("layers", "output")])
    assert {sink.trunk for sink in cap.sinks.found} == {"encoder.layers"}
    everything = cap.output("decoder.layers").magnitude("median").values
    np.testing.assert_array_equal(
        cap.output("decoder.layers").magnitude("median", positions="no_sink").values, everything
    )
    assert cap.output("encoder.layers").sink_tokens().values.tolist() == [1] * 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["no_sink", "sink"])
def test_padding_counts_under_no_position(side, where):
    mask = np.ones((SAMPLES, LENGTH), dtype=int)
    mask[:, slice(0, 4) if side == "left" else slice(5, LENGTH)] = 0
    first = int(np.flatnonzero(mask[0])[0])
    values = script(4, sinks=[(i, s, first, 3, 300.0) for i in range(4) for s in (0, 1)])
    site = captured(values, mask).output("layers")
    real = [[x[mask[0].astype(bool)][1:] if where == "no_sink" else x[first : first + 1] for x in v] for v in values]
    for stat in ("min", "median", "top1"):
        got = site.magnitude(stat, positions=where).values
        np.testing.assert_allclose(got, [oracle.metric("magnitude", x, stat=stat) for x in real], 1e-6)
