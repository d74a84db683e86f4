"""`qsa calibrate`: the noise floor of a suite's numbers, and bounds that keep above it."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pytest_qsa.checkpoint import Files, capture_weights, open_folder
from pytest_qsa.cli import main
from pytest_qsa.common.errors import AnomalyError, SuiteError
from pytest_qsa.engine.load.data import batches_of
from pytest_qsa.metrics import ANY, Query, Series
from pytest_qsa.suite import Data, load_suite
from pytest_qsa.tools.calibrate import IDENTICAL, Sampled, Spread, of_answers, proposals_of
from pytest_qsa.tools.suite_text import calibrated
from pytest_qsa.verdicts import checked_series
from support import models
from support.checkpoints import edited
from support.projects import suite

SUITE = """\
# the gate of a small model
model: {{name: small, path: {path}}}
data: {{num_samples: 2, seq_len: 24}}
memory: {{device: cpu}}
assertions:
  # why it is there
  - id: peaks
    metric: absmax
    layers: layers\\.\\d$   # the blocks
    site: output
    max: 1000   # loose
    min: 1e-3
    reason: a reason
  - id: groups
    metric: absmax
    layers: layers\\.\\d$
    site: output
    max:
      'layers\\.[01]$': 500
      default: 600
  - {{id: finite, metric: nonfinite, layers: layers\\.\\d$, site: output, max: 7}}
  - {{id: files, metric: checkpoint_keys}}
  - {{id: drift, metric: magnitude, stat: median, layers: down_proj$, site: output, baseline: {{rel: 0.1}}}}
  - {{id: token, metric: sink_tokens, layers: layers\\.\\d$, site: output, equals: 0}}
"""


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, llama):
    """Calibrate a suite once, into a copy beside it; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("calibrate")
    (folder / "gate.qsa.yaml").write_text(SUITE.format(path=llama))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        out = folder / "out.txt"
        with out.open("w") as stream:
            patch.setattr("sys.stdout", stream)
            assert main(["calibrate", "gate.qsa.yaml", "--parts", "4", "-k", "3", "-o", "new.qsa.yaml"]) == 0
    return folder


@pytest.fixture(scope="module")
def peaks(llama):
    """Return the largest |x| at the outputs of the four blocks on each of four parts, [4, 4], by plain hooks."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    windows = batches_of(Data(num_samples=8, seq_len=24), tokenizer, llama)
    rows = []
    for part in range(4):
        batches = [batch["input_ids"] for batch in windows[2 * part : 2 * part + 2]]
        layers = [models.record(model, batches, f"model.layers.{layer}", "output") for layer in range(4)]
        rows.append([max(np.abs(sample).max() for sample in layer) for layer in layers])
    assert len({tuple(batch["input_ids"][0].tolist()) for batch in windows}) == 8
    return np.array(rows)


def written(calibration, name):
    return next(a for a in load_suite(calibration / "new.qsa.yaml").assertions if a.id == name)


def test_a_bound_is_the_mean_and_k_sigma_of_the_layer_that_reaches_farthest(calibration, peaks):
    means, sigmas = peaks.mean(axis=0), peaks.std(axis=0, ddof=1)
    top, bottom = int(np.argmax(means + 3 * sigmas)), int(np.argmin(means - 3 * sigmas))
    assertion = written(calibration, "peaks")
    for side, layer, sign, worst in (("max", top, 1, peaks.max()), ("min", bottom, -1, peaks.min())):
        noise = getattr(assertion.noise, side)
        assert (noise.n, noise.k) == (4, 3)
        assert noise.mean == pytest.approx(means[layer], rel=1e-3)
        assert noise.sigma == pytest.approx(sigmas[layer], rel=1e-3)
        floor = means[layer] + sign * 3 * sigmas[layer]
        reached = sign * max(sign * floor, sign * worst)
        assert getattr(assertion, side) == pytest.approx(reached, rel=0.1)
        assert sign * getattr(assertion, side) >= sign * reached - 1e-3 * abs(reached)


def test_each_group_of_layers_has_a_bound_of_its_own(calibration, peaks):
    floors = peaks.mean(axis=0) + 3 * peaks.std(axis=0, ddof=1)
    bounds = written(calibration, "groups").max
    first, rest = max(floors[:2].max(), peaks[:, :2].max()), max(floors[2:].max(), peaks[:, 2:].max())
    for bound, floor in ((bounds[r"layers\.[01]$"], first), (bounds["default"], rest)):
        unit = 10 ** (math.floor(math.log10(floor)) - 1)
        assert floor * (1 - 1e-3) <= bound <= floor + unit


def test_counts_get_whole_numbers(calibration):
    assert written(calibration, "finite").max == 0
    assert written(calibration, "finite").noise.max.sigma == 0


def test_comments_and_layout_stay_and_the_figures_stand_beside_the_bound(calibration, llama):
    before, after = (SUITE.format(path=llama).splitlines(), (calibration / "new.qsa.yaml").read_text().splitlines())
    kept = [
        line for line in before if not any(word in line for word in ("max: 1000", "min: 1e", "500", "600", "finite"))
    ]
    assert [line for line in after if line in kept] == kept
    assert any(line.startswith("    max: ") and line.endswith("   # loose") for line in after)
    added = [line for line in after if line.lstrip().startswith("noise:")]
    assert len(added) == 2
    assert all("# calibrated: model.layers." in line and "4 parts of 2 × 24 tokens" in line for line in added)
    assert next(line for line in after if "id: finite" in line).endswith("n: 4, k: 3}}}")


def test_the_table_says_what_was_measured_and_what_could_not_be(calibration):
    lines = (calibration / "out.txt").read_text().splitlines()
    assert lines[0] == "small: 4 parts of 2 × 24 tokens of sample; deterministic: yes"
    rows = [line.split()[0] for line in lines[1:]]
    assert rows[:6] == ["assertion", "peaks", "peaks", "groups", "groups", "finite"]
    assert "files: reads files, which do not vary" in lines
    assert any(
        line.startswith("drift: a baseline is held on its own text; another one moves model.layers") for line in lines
    )
    assert "token: equals 0.0: 0 in the 4 parts" in lines


def test_calibrating_what_is_calibrated_changes_nothing(calibration, monkeypatch, capsys):
    monkeypatch.chdir(calibration)
    text = (calibration / "new.qsa.yaml").read_text()
    (calibration / "again.qsa.yaml").write_text(text)
    assert main(["calibrate", "again.qsa.yaml", "--parts", "4", "-k", "3", "--passes", "1", "--write"]) == 0
    assert (calibration / "again.qsa.yaml").read_text() == text
    assert "no pass was repeated" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_replaced_without_force(calibration, monkeypatch, capsys):
    monkeypatch.chdir(calibration)
    text = (calibration / "new.qsa.yaml").read_text()
    assert main(["calibrate", "gate.qsa.yaml", "-o", "new.qsa.yaml"]) == 1
    assert "new.qsa.yaml exists: give --force" in capsys.readouterr().err
    assert (calibration / "new.qsa.yaml").read_text() == text


def test_too_little_text_for_the_parts_is_said(calibration, monkeypatch, capsys):
    monkeypatch.chdir(calibration)
    (calibration / "short.txt").write_text("a few words " * 9)
    assert main(["calibrate", "gate.qsa.yaml", "--data.source", "custom:short.txt"]) == 1
    assert "too little text in 'custom:" in capsys.readouterr().err


NOISE = "max: 40, noise: {max: {mean: 31.2, sigma: 1.5, n: 8, k: 6}}"


@pytest.mark.parametrize(
    ("bounds", "override", "told"),
    [
        ("max: 40", None, r"g.qsa.yaml:4: max 40 is below the noise floor 40.2 \(mean 31.2 \+ 6 × sigma 1.5 over 8"),
        ("max: 41", "assertions.a.max=39", r"--qsa-set assertions.a.max=39: max 39 is below the noise floor 40.2"),
        ("min: 40", None, "noise.max stands beside no max"),
        ("max: {'layers': 50}", None, "noise.max is of another form than max"),
        ("max: 41", None, None),
    ],
)  # fmt: skip
def test_a_bound_below_the_noise_floor_is_refused_with_the_figure(tmp_path, bounds, override, told):
    file = tmp_path / "g.qsa.yaml"
    noise = "noise: {max: {mean: 31.2, sigma: 1.5, n: 8, k: 6}}"
    file.write_text(suite("x", f"id: a, metric: absmax, layers: x, site: output, {bounds}, {noise}"))
    if told is None:
        assert load_suite(file).assertions[0].max == 41
    else:
        with pytest.raises(SuiteError, match=told):
            load_suite(file, [override] if override else [])


def test_a_bound_of_a_group_above_the_floor_against_the_original_is_refused(tmp_path):
    file = tmp_path / "g.qsa.yaml"
    noise = "noise: {min: {q_proj: {mean: 41.5, sigma: 0.5, n: 8, k: 6}, default: {mean: 30, sigma: 0, n: 8, k: 6}}}"
    file.write_text(suite("x", f"id: a, metric: sqnr, layers: x, min: {{q_proj: 40, default: 30}}, {noise}"))
    with pytest.raises(
        SuiteError, match=r"min of 'q_proj' 40 is above the noise floor 38.5 \(mean 41.5 − 6 × sigma 0.5"
    ):
        load_suite(file)


def series(values, unit="dB", interval=None):
    query = Query("sqnr", "1", "output", "x", unit=unit)
    ends = {"a": (values[0] - interval, values[0] + interval, 9)} if interval else {}
    return Series(["a", "b"][: len(values)], np.array(values), query, intervals=ends)


def test_what_never_differs_from_the_original_has_to_stay_so():
    spread = Spread.of([series([30.0, np.inf]), series([32.0, np.inf])], series([31.0, np.inf]))
    assertion = SimpleNamespace(stated={"min": {"a": 0.0, "b": 0.0}}, reach=ANY)
    a, b = proposals_of(assertion, spread, None, 1)
    assert (a.noise.mean, a.proposed) == (31.0, 29.0)
    assert (b.noise.mean, b.noise.sigma, b.proposed) == (IDENTICAL, 0.0, IDENTICAL)


def test_a_number_of_tokens_that_never_varied_gets_room_for_one_more():
    assertion = SimpleNamespace(stated={"max": 0.0}, reach=ANY)
    for unit, parts, proposed in (
        ("tokens", [1.0, 1.0], 2.0),
        ("elements", [1.0, 1.0], 1.0),
        ("tokens", [1.0, 3.0], 5.0),
    ):
        spread = Spread.of([series([value, value], unit=unit) for value in parts], series([max(parts)] * 2, unit=unit))
        (found,) = proposals_of(assertion, spread, None, 2)
        assert found.proposed == proposed, (unit, parts)


def test_no_bound_lies_beyond_what_the_number_can_be():
    spread = Spread.of([series([value], unit="") for value in (0.2, 0.8)], series([0.5], unit=""))
    for side, proposed in (("min", 0.0), ("max", 1.0)):
        (found,) = proposals_of(SimpleNamespace(stated={side: 0.5}, reach=(0.0, 1.0)), spread, None, 6)
        assert found.proposed == proposed
        (free,) = proposals_of(SimpleNamespace(stated={side: 0.5}, reach=ANY), spread, None, 6)
        assert not 0 <= free.proposed <= 1


def test_an_estimate_varies_by_its_standard_error_at_least():
    near = [series([5.0 + 0.01 * part], unit="", interval=1.96) for part in range(3)]
    assert Spread.of(near, near[0]).sigmas == pytest.approx([1.0], rel=1e-4)
    far = [series([5.0 + 3 * part], unit="", interval=1.96) for part in range(3)]
    assert Spread.of(far, far[0]).sigmas == pytest.approx([3.0])


@pytest.fixture(scope="module")
def original(tmp_path_factory, int8_llama, llama):
    """Calibrate a suite against the original; return the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("original")
    bounds = ("id: close, metric: nmse, layers: 'layers\\.\\d$', max: 9", "id: same, metric: same_top, min: 0")
    sections = "memory: {device: cpu}\n"
    text = suite(int8_llama, *bounds, sections=sections).replace("}\ndata", f", reference: {llama}}}\ndata", 1)
    (folder / "gate.qsa.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch, (folder / "out.txt").open("w") as stream:
        patch.setattr("sys.stdout", stream)
        assert main(["calibrate", str(folder / "gate.qsa.yaml"), "--parts", "3", "-k", "3", "--write"]) == 0
    return folder


def test_a_suite_with_a_reference_is_calibrated_against_it(original):
    close, same = load_suite(original / "gate.qsa.yaml").assertions
    assert 0 < close.noise.max.floor("max") <= close.max < 0.1
    assert 0.5 < same.min <= same.noise.min.floor("min") < 1
    assert "deterministic: yes" in (original / "out.txt").read_text()


def test_a_reference_that_was_kept_on_its_own_tokens_cannot_be_calibrated_against(original, capsys):
    (original / "kept.qsa").write_bytes(b"")
    assert main(["calibrate", str(original / "gate.qsa.yaml"), "--model.reference", "kept.qsa"]) == 1
    assert "kept.qsa was kept on its own tokens" in capsys.readouterr().err


@pytest.mark.process
def test_pytest_refuses_such_a_suite_as_wrong(own_project, llama):
    own_project.write("g.qsa.yaml", suite(llama, f"id: a, metric: absmax, layers: x, site: output, {NOISE}"))
    run = own_project.pytest("g.qsa.yaml")
    assert run.code == 2
    assert "g.qsa.yaml:4: max 40 is below the noise floor 40.2" in run.out


@pytest.mark.process
def test_the_ratchet_stops_at_the_noise_floor_and_leaves_a_number_of_tokens_its_room_for_one_more(own_project, llama):
    blocks, steady = r"layers: layers\.\d$, site: output", "noise: {max: {mean: 0, sigma: 0, n: 8, k: 6}}"
    text = suite(
        llama,
        f"id: a, metric: absmax, {blocks}, max: 900, noise: {{max: {{mean: 500, sigma: 10, n: 8, k: 6}}}}",
        f"id: calibrated, metric: outlier_tokens, {blocks}, max: 11, {steady}",
        f"id: stated, metric: outlier_tokens, {blocks}, max: 12",
        f"id: elements, metric: nonfinite, {blocks}, max: 13, {steady}",
    )
    own_project.write("g.qsa.yaml", text)
    run = own_project.pytest("--qsa-ratchet", "--qsa-report=never")
    found = {name: int(bound) for name, bound in re.findall(r"^\+.*id: (\w+),.* max: (\d+)", run.out, re.MULTILINE)}
    assert found == {"a": 560, "calibrated": 1, "stated": 0, "elements": 0}, run.out


def test_a_bound_that_stands_elsewhere_is_left_and_named(calibration):
    from pytest_qsa.suite import Noise
    from pytest_qsa.tools.calibrate import Proposal

    def proposal(bound):
        return Proposal("max", "", "layers.1", bound, 3.0, Noise(mean=2, sigma=0.1, n=4, k=6))

    text = (
        "x: &shared {metric: absmax, max: 9}\n"
        "assertions:\n"
        "  inherits: {site: input}\n"
        "  aliased: *shared\n"
        "  first: &both {max: 7}\n"
        "  second: *both\n"
        "  own:\r\n    max: 8 # eight\r\n    site: input\r\n"
    )
    names = ["inherits", "aliased", "first", "second", "absent", "own"]
    changed, left = calibrated(text, {name: [proposal(8.0)] for name in names}, "4 parts")
    assert left == names[:-1]
    assert changed == text.replace(
        "max: 8 # eight\r\n",
        "max: 3 # eight\r\n    noise: {max: {mean: 2, sigma: 0.1, n: 4, k: 6}}  # calibrated: layers.1, 4 parts\r\n",
    )


def test_the_error_of_weights_gets_room_below_the_original_rounded_to_nearest():
    """What clips, rounds or is calibrated otherwise is no fault; a layer that is worse has its room too."""
    values = np.array([[40.0, 30.0, 41.0]] * 2)
    spread = Spread(["a", "b", "c"], values, values[0], np.zeros(3), rounded=np.array([39.5, 39.0, 41.0]), room=4.0)
    assertion = SimpleNamespace(stated={"min": {"a": 0.0, "b": 0.0, "c": 0.0}}, reach=ANY)
    found = {each.group: each for each in proposals_of(assertion, spread, None, 10.0)}
    assert {group: each.proposed for group, each in found.items()} == {"a": 35.0, "b": 26.0, "c": 37.0}
    assert found["a"].noise.floor("min") == 35.5
    assert [spread.is_apart(index) for index in range(3)] == [False, True, False]


def test_int8_of_the_original_is_calibrated_with_its_room_and_written_so(
    tmp_path, llama, int8_llama, monkeypatch, capsys
):
    text = suite(
        f"{int8_llama}, reference: {llama}, weights: files",
        "id: close, metric: weight_sqnr, layers: _proj$, site: weight, min: 0",
        "id: rows, metric: weight_sqnr, by: channel, layers: _proj$, site: weight, min: 0",
        "id: gain, metric: weight_gain, layers: _proj$, site: weight, max: 1",
    )
    (tmp_path / "gate.qsa.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "gate.qsa.yaml", "--write"]) == 0
    noise = {each.id: each.noise.min for each in load_suite(tmp_path / "gate.qsa.yaml").assertions if each.noise}
    assert {name: each.room for name, each in noise.items()} == {"close": 4.0, "rows": 6.0}
    bounds = {each.id: each.stated for each in load_suite(tmp_path / "gate.qsa.yaml").assertions}
    assert noise["close"].mean - 5.1 < bounds["close"]["min"] <= noise["close"].mean - 4
    assert bounds["gain"] == {"max": 1.0}
    assert "gain: its bound follows from the bits of the weights" in capsys.readouterr().out
    (tmp_path / "tight.qsa.yaml").write_text(
        (tmp_path / "gate.qsa.yaml").read_text().replace(f"min: {bounds['close']['min']:g}", "min: 99")
    )
    with pytest.raises(SuiteError, match="would fail where it is quantized again"):
        load_suite(tmp_path / "tight.qsa.yaml")


def requantized(clip, seed=None):
    """Return a change of int8 weights of the original: quantized again with another clip, or rounded by chance."""

    def change(original):
        def changed(weights):
            generator = torch.Generator().manual_seed(seed or 0)
            for name in [name for name in weights if name.endswith("_proj.weight")]:
                values = original[name].float()
                scale = values.abs().amax(1, keepdim=True) * clip / 127.5
                chance = 0.5 if seed is None else torch.rand(values.shape, generator=generator)
                weights[name] = (values / scale + chance).floor().clamp(-128, 127).to(torch.int8)
                weights[f"{name}_scale"] = scale.to(weights[f"{name}_scale"].dtype)

        return changed

    return change


@pytest.fixture(scope="module")
def of_weights(tmp_path_factory, llama, int8_llama):
    """Calibrate a suite on the weights of an int8 model; return its file and what was printed."""
    folder = tmp_path_factory.mktemp("weights")
    assertions = "\n".join(
        f"  - {{id: {metric}, metric: {metric}, layers: _proj$, site: weight, min: 0, max: 0}}" for metric in OF_WEIGHTS
    )
    text = f"model: {{name: m, path: {int8_llama}, reference: {llama}, weights: files}}\nassertions:\n{assertions}\n"
    (folder / "gate.qsa.yaml").write_text(text)
    assert main(["calibrate", str(folder / "gate.qsa.yaml"), "--write"]) == 0
    return folder / "gate.qsa.yaml"


OF_WEIGHTS = ("mean", "rms", "absmax")


def test_layers_that_cannot_be_quantized_again_keep_their_own_number_as_the_middle():
    query = Query("mean", "1", "weight", ".")
    whole = Series(["a", "conv", "b"], np.array([1.0, 2.0, 3.0]), query)
    spread = Spread.of([whole, whole], whole)
    np.testing.assert_array_equal(spread.of_layers(Series(["a", "b"], np.array([1.5, 3.5]), query)), [1.5, 2.0, 3.5])


@pytest.mark.parametrize("change", [requantized(0.97), requantized(1, seed=1), requantized(0.93, seed=2)])
def test_bounds_on_weights_leave_room_for_the_same_original_quantized_otherwise(
    of_weights, llama, int8_llama, tmp_path, change
):
    folder = edited(int8_llama, tmp_path / "again", change(load_file(llama / "model.safetensors")))
    weights = [assertion.request for assertion in load_suite(of_weights).assertions]
    capture = capture_weights(Files(open_folder(folder)), weights)
    for assertion in load_suite(of_weights).assertions:
        values = checked_series(assertion, capture).values
        assert (assertion.min < values).all(), assertion.id
        assert (values < assertion.max).all(), assertion.id


def test_the_room_of_a_mean_of_weights_is_far_below_a_zero_point_that_is_off_by_one(of_weights, llama):
    bound = next(each for each in load_suite(of_weights).assertions if each.id == "mean")
    assert bound.noise.max.room > 0
    step = min(
        float(tensor.float().abs().amax(1).mean()) / 127.5
        for name, tensor in load_file(llama / "model.safetensors").items()
        if name.endswith("_proj.weight")
    )
    assert bound.noise.max.room < step / 2


def test_a_calibration_that_is_too_thin_says_so_for_each_assertion_and_what_would_be_enough(calibration):
    out = (calibration / "out.txt").read_text()
    thin = [line for line in out.splitlines() if "thin: 4 parts tell sigma to ± 41%, a part has 48 tokens" in line]
    assert len(thin) == out.count("noise") or len(thin) >= 2
    assert "enough: --parts 8 and data.num_samples: 43 in the suite" in thin[0]


def noise_of(mean, sigma, unit=""):
    """Return what is said of a calibration whose one layer has these numbers in 8 parts of 2048 tokens."""
    values = np.array([[mean + sigma * each] for each in (-1, 1) * 4])
    spread = Spread(["a"], values, values.mean(axis=0), np.zeros(1), unit)
    sampled = Sampled([None] * 8, SimpleNamespace(tokens=[np.zeros(256)] * 64, sites={}, schemes=None), ())
    return list(
        sampled._thin(spread, proposals_of(SimpleNamespace(stated={"max": 0.0}, reach=ANY), spread, None, 10.0))
    )


def test_noise_as_large_as_the_mean_is_told_with_the_text_that_it_takes():
    assert noise_of(0.1, 0.005) == []
    assert noise_of(0.1, 0.02) == ["thin: 10 sigma are 2.1 × the mean; enough: data.num_samples: 37 in the suite"]
    assert "more text hardly helps" in noise_of(0.001, 0.02)[0]
    assert noise_of(1, 1, "tokens") == []


def test_data_of_another_size_than_the_suites_is_refused(calibration, monkeypatch, capsys):
    monkeypatch.chdir(calibration)
    assert main(["calibrate", "gate.qsa.yaml", "--data.num_samples", "4"]) == 2
    assert "gate.qsa.yaml: 4 × 24 tokens are measured, and the suite runs on 2 × 24" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("pytest_qsa.tools.Sampled.of", lambda *arguments, **options: pytest.fail("measured"))
        assert main(["calibrate", "gate.qsa.yaml", "--data.seq_len", "12"]) == 2


def answers(value, half, least, stat="ended"):
    query = Query("generation", "1", "logits", "", parameters={"stat": stat})
    ends = {"generation": (value - half, value + half, 32)}
    return Series(["generation"], np.array([value]), query, intervals=ends, least={"generation": least})


def of_stat(stat, **bounds):
    return SimpleNamespace(id="it", metric="generation", parameters={"stat": stat}, stated=bounds, reach=ANY)


def test_a_bound_on_answers_is_what_chance_makes_of_a_perfect_number():
    """Three standard errors, whatever `-k` says beyond that: ten of them would be more than all answers."""
    for value, half, proposed in ((0.03, 0.1, -0.16), (-0.1, 0.1, -0.16), (-0.1, 0.0, -0.2)):
        (each,) = of_answers(of_stat("ended", min=0.0), answers(value, half, -0.75), 10).proposals
        assert each.proposed == proposed
        assert (each.noise.over, each.noise.n, each.noise.k) == ("prompts", 32, 3)
    assert pytest.approx(-3 * 0.1 / 1.96, abs=0.01) == -0.16
    assert pytest.approx(-0.1 - 3 / 32, abs=0.01) == -0.2  # one prompt's share, below a number that is beyond chance
    for value, bounds, odd in ((1.1, (0.84, 1.2), False), (1.4, (1.2, 1.6), True)):
        found = of_answers(of_stat("length_ratio", min=0.0, max=0.0), answers(value, 0.1, -np.inf, "length_ratio"), 10)
        assert tuple(each.proposed for each in found.proposals) == bounds
        assert ("more than chance makes of 1: look at it" in found.remark) is odd
        assert "32 prompts leave room of 0." in found.remark


def test_too_few_prompts_for_a_bound_on_answers_say_how_many_it_takes():
    with pytest.raises(
        AnomalyError, match=r"by chance 32 prompts may differ by 0\.31, and 0\.25 is all .* about 197 such"
    ):
        of_answers(of_stat("ended", min=0.0), answers(0.0, 0.2, -0.25), 10)
    with pytest.raises(AnomalyError, match=r"32 prompts give no interval"):
        of_answers(of_stat("ended", min=0.0), answers(0.0, np.nan, -0.25), 10)
