"""A reference that was kept as a file: its numbers against those of two models side by side, and what it refuses."""

import contextlib
import random
import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from pytest_qsa import capture
from pytest_qsa.captures import Request
from pytest_qsa.captures.merging import merge
from pytest_qsa.captures.provenance import ModelProvenance, Provenance
from pytest_qsa.cli import capture as capture_command, main
from pytest_qsa.common.errors import AnomalyError, InfraError, QsaError, QsaWarning, SuiteError
from pytest_qsa.engine import SampleShare, capture_subject
from pytest_qsa.engine.reference.live import LiveReference
from pytest_qsa.engine.reference.predicted import located_head, read_head
from pytest_qsa.engine.reference.record import RecordOptions, record_model
from pytest_qsa.engine.reference.reference_file import ReferenceFile, drawn_tokens
from pytest_qsa.engine.reference.replay import ReplayedReference
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.engine.vllm.recorded import RecordedComparison
from pytest_qsa.suite import load_suite, subject_of
from support import checkpoints, models, projects
from support.captures import flipped, statistics, with_header, without_checksum
from support.models import BLOCKS, LINEAR, damaged

BATCHES = [models.token_batch(2, 24, bos=True), models.token_batch(2, 24, seed=5, bos=True)]
COMPARED = statistics("error", "reference_tokens", "reference_sinks", "tokens", "sinks")
LOCAL = statistics("local:24", "reference_sinks")
REQUESTS = (
    Request(BLOCKS, "output", None, COMPARED),
    Request(LINEAR, "output", None, statistics("error", "reference_sinks", "local:32")),
    Request("", "logits", None, statistics("scores", "agreement")),
)
SHARES = ("sqnr", "nmse", "relative_l2", "cosine")


def kept_file(folder, model, batches=BATCHES, requests=REQUESTS, **keep):
    keep = RecordOptions(**{"with_head": True, **keep})
    path = folder / "ref.qsa"
    path.write_bytes(record_model(model, batches, requests, keep).content.to_bytes())
    return path


def against(path, model, batches=BATCHES, requests=REQUESTS):
    return run_pass(model, batches, requests, [ReplayedReference(ReferenceFile.open(path), torch.device("cpu"))])


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def pair(request, tmp_path_factory):
    """A model and its damaged copy: compared side by side, and from a file that has every row."""
    model = models.llama(request.param, sink=True, num_hidden_layers=3)
    other = damaged(model)
    path = kept_file(tmp_path_factory.mktemp("kept"), model, rows=24)
    live = run_pass(other, BATCHES, REQUESTS, [LiveReference(model)])
    local = run_pass(other, BATCHES, [Request(LINEAR, "output", None, LOCAL)], [LiveReference(model)])
    return live, local, against(path, other), model, other, path


@pytest.mark.parametrize("metric", ["sqnr", "nmse", "relative_l2", "cosine", "max_abs_diff"])
@pytest.mark.parametrize("positions", ["all", "no_sink", "sink", {"skip_first": 3}])
def test_a_file_with_every_row_has_the_numbers_of_both_models(pair, metric, positions):
    live, _, kept, *_ = pair
    for pattern in (BLOCKS, LINEAR):
        one, other = (getattr(c.output(pattern), metric)(positions=positions) for c in (live, kept))
        np.testing.assert_allclose(other.values, one.values, rtol=1e-2, atol=5e-5)  # of float32, 16 bits are kept
        assert one.layers == other.layers


def test_local_error_comes_from_the_rows(pair):
    _, live, kept, *_ = pair
    one, other = (c.output(LINEAR).local_sqnr(24 if c is live else 32, positions="all") for c in (live, kept))
    np.testing.assert_allclose(other.values, one.values, rtol=2e-3)
    assert {count for *_, count in other.intervals.values()} == {96}


def test_predictions_come_from_the_last_hidden_states(pair):
    live, _, kept, *_ = pair
    for stat, rtol in (("mean", 1e-2), ("median", 1e-2), ("p99", 2e-2)):
        one, other = (c.logits().kl_divergence(stat).values for c in (live, kept))
        np.testing.assert_allclose(other, one, rtol=rtol)
    for name in ("same_top", "delta_p", "perplexity", "ln_ppl_ratio"):
        one, other = (getattr(c.logits(), name)().values for c in (live, kept))
        np.testing.assert_allclose(other, one, rtol=1e-2)


def test_outliers_and_sinks_are_those_of_the_reference(pair):
    live, _, kept, *_ = pair
    assert kept.reference.sinks == live.reference.sinks
    assert {sink.position for sink in kept.reference.sinks.found} == {0}
    for name in ("new_outliers", "lost_outliers"):
        for positions in ("all", "no_sink"):
            one, same = (getattr(c.output(BLOCKS), name)(1.5, positions=positions).values for c in (live, kept))
            np.testing.assert_array_equal(same, one)
    assert kept.output(BLOCKS).lost_outliers(1.5, positions="all").values.sum() > 0


def test_rows_that_another_engine_kept_have_the_numbers_of_a_pass_beside_the_file(pair, tmp_path):
    *_, model, other, _ = pair
    path = kept_file(tmp_path, model, rows=5)
    expected = against(path, other)
    requests = [replace(each, statistics=each.statistics - statistics("local:32")) for each in REQUESTS]
    own = run_pass(other, BATCHES, [replace(each, statistics=COMPARED - statistics("error")) for each in requests[:2]])
    with RecordedComparison(ReferenceFile.open(path), other, BATCHES, requests, "") as recorded:
        drawn = recorded.drawn
        assert [len(each) for each in drawn.rows] == [5] * 4
        found = recorded.added_to(own, rows_at(other, drawn))
    for metric in (*SHARES, "new_outliers"):
        one, same = (getattr(c.output(BLOCKS), metric)() for c in (expected, found))
        np.testing.assert_allclose(same.values, one.values, rtol=1e-5)
        np.testing.assert_allclose(list(same.intervals.values()), list(one.intervals.values()), rtol=1e-5)
    np.testing.assert_allclose(found.output(LINEAR).sqnr().values, expected.output(LINEAR).sqnr().values, rtol=1e-5)
    assert found.reference.provenance.rows == 5


def rows_at(model, drawn):
    """Return the drawn rows of each site, all samples joined, as vLLM's workers keep them."""
    seen = {(*site, 0): [] for site in drawn.sites}
    with contextlib.ExitStack() as exits, torch.no_grad():
        for layer, site in drawn.sites:

            def keep(module, args, output, key=(layer, site, 0)):
                seen[key] += list(output[0] if isinstance(output, tuple) else output)

            exits.callback(model.get_submodule(layer).register_forward_hook(keep).remove)
        for batch in BATCHES:
            model(batch)
    return {key: torch.cat([x[at] for x, at in zip(each, drawn.rows, strict=True)]) for key, each in seen.items()}


def test_neither_order_nor_batches_nor_padding_change_which_rows_are_drawn(tmp_path):
    model = models.llama(torch.bfloat16, num_hidden_layers=2)
    ids = models.token_batch(3, 20)
    padded = models.padded_batch([20, 12, 20], side="left")
    padded["input_ids"][0], padded["input_ids"][2] = ids[0], ids[2]
    short = padded["input_ids"][1, 8:]
    files = []
    for name, batches in (("a", [ids[:1], ids[2:], short[None]]), ("b", [padded])):
        (tmp_path / name).mkdir()
        files.append(ReferenceFile.open(kept_file(tmp_path / name, model, batches)))
    one, other = files
    assert sorted(one.samples) == sorted(other.samples)
    for call in one.calls:
        if "rows" not in one.calls[call]:
            continue
        (rows, at), (same, also_at) = one.rows(call), other.rows(call)
        for sample, index in one.samples.items():
            assert at[index].tolist() == also_at[other.samples[sample]].tolist()
            torch.testing.assert_close(rows[index], same[other.samples[sample]], rtol=0.1, atol=0.1)
    others = [drawn_tokens(seed, text * 32, 20, 4).tolist() for seed, text in ((0, "ab"), (1, "ab"), (0, "cd"))]
    assert others[0] not in others[1:]


def test_a_suite_may_run_its_samples_in_another_order_and_in_other_batches(pair):
    live, *_, other, path = pair
    rows = [row[None] for batch in reversed(BATCHES) for row in batch]
    kept = against(path, other, rows)
    np.testing.assert_allclose(kept.output(LINEAR).sqnr().values, live.output(LINEAR).sqnr().values, rtol=1e-2)
    np.testing.assert_allclose(kept.logits().kl_divergence().values, live.logits().kl_divergence().values, rtol=2e-2)
    padded = {"input_ids": torch.cat([torch.zeros(2, 8, dtype=torch.long), BATCHES[0]], dim=1)}
    padded["attention_mask"] = (torch.arange(32) >= 8).long().expand(2, -1)
    part, whole = against(path, other, [padded]), against(path, other, BATCHES[:1])
    for series in (lambda c: c.output(LINEAR).sqnr(), lambda c: c.logits().kl_divergence(),
                   lambda c: c.output(BLOCKS).new_outliers(1.5)):  # fmt: skip
        np.testing.assert_allclose(series(part).values, series(whole).values, rtol=2e-2)


def test_the_interval_of_drawn_rows_holds_the_number_of_all_tokens(tmp_path):
    model = models.llama(num_hidden_layers=2)
    other = damaged(model, 0.1)
    batches = [models.token_batch(16, 48)]
    requests = [Request(f"{BLOCKS}|{LINEAR}", "output", None, COMPARED)]
    live = run_pass(other, batches, requests, [LiveReference(model)])
    inside = {name: [] for name in SHARES}
    for seed in range(4):
        kept = against(kept_file(tmp_path, model, batches, requests, seed=seed, rows=4), other, batches, requests)
        for name in SHARES:
            true, series = (getattr(c.output(f"{BLOCKS}|{LINEAR}"), name)(positions="all") for c in (live, kept))
            for layer, value in zip(true.layers, true.values.tolist(), strict=True):
                low, high, count = series.intervals[layer]
                assert count == 64
                assert low < high < low + 3
                inside[name].append(low <= value <= high)
    for name, hits in inside.items():
        assert 0.9 <= np.mean(hits) <= 1, (name, np.mean(hits))


def test_the_same_model_data_and_seed_make_the_same_file(tmp_path):
    model = models.llama(num_hidden_layers=2)
    contents = [kept_file(tmp_path, model, seed=seed, rows=3).read_bytes() for seed in (0, 0, 1)]
    same = [content == contents[0] for content in contents]
    assert same == [True, True, False]


# What a head may be.


def test_a_head_that_scales_its_logits_is_found_out(tmp_path):
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=3.0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    other = damaged(model)
    kept = against(kept_file(tmp_path, model), other).logits().kl_divergence().values
    live = capture(other, BATCHES, sites=[("", "logits")], reference=model).logits().kl_divergence().values
    np.testing.assert_allclose(kept, live, rtol=1e-2)


def test_logits_that_the_head_does_not_make_are_refused(tmp_path):
    model = models.llama(num_hidden_layers=2)
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 1.1))
    with pytest.raises(InfraError, match=r"can't be kept: logits made again by lm_head differ from the model's by"):
        kept_file(tmp_path, model)
    kept = record_model(model, BATCHES, REQUESTS[:1], RecordOptions())
    assert "differ" in kept.problem
    assert kept.content.head is None
    path = tmp_path / "without.qsa"
    path.write_bytes(kept.content.to_bytes())
    with pytest.raises(AnomalyError, match="holds nothing of what the model predicts: make it anew"):
        against(path, model)


def test_a_model_without_a_head_is_kept_for_its_layers(tmp_path):
    model = models.llama(num_hidden_layers=2).model
    kept = record_model(model, BATCHES, (), RecordOptions())
    assert "no layer that makes logits" in kept.problem
    assert {call[:2] for call in kept.content.calls} == {("layers.0", "output"), ("layers.1", "output")}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_read_alone_from_its_checkpoint(tmp_path, tied):
    model = models.llama(torch.bfloat16, num_hidden_layers=2, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    kept = record_model(
        model, BATCHES, (), RecordOptions(), lambda head: located_head(head, str(tmp_path / "model"), None, tmp_path)
    )
    path = tmp_path / "ref.qsa"
    path.write_bytes(kept.content.to_bytes())
    entry = ReferenceFile.open(path).header["head"]
    assert entry["path"] == "model"
    assert entry["weight"]["name"] == ("model.embed_tokens.weight" if tied else "lm_head.weight")
    torch.testing.assert_close(read_head(entry, path).weight, model.lm_head.weight, rtol=0, atol=0)
    assert kept.distance == 0


# What is refused.


def test_a_site_that_the_file_does_not_hold_is_told(pair):
    *_, other, path = pair
    with pytest.raises(AnomalyError, match=r"ref.qsa holds no rows of the input of model.layers.0.mlp: make it anew"):
        against(path, other, requests=[Request(r"mlp$", "input", None, statistics("error"))])
    few = kept_file(path.parent / "..", models.llama(num_hidden_layers=3), requests=REQUESTS[:1])
    maxima = [Request("q_proj", "output", None, statistics("reference_tokens"))]
    with pytest.raises(AnomalyError, match="holds no maxima of the tokens of the output"):
        against(few, other, requests=maxima)


def test_other_data_is_told(pair):
    *_, other, path = pair
    with pytest.raises(AnomalyError, match=r"made of other tokens: sample 1 isn't among its 4 samples"):
        against(path, other, [torch.cat([BATCHES[0][:1], models.token_batch(1, 24, seed=9)])])


def test_a_layer_of_another_width_is_told(pair):
    *_, path = pair
    with pytest.raises(InfraError, match="is 16 here and 32 in the reference"):
        against(path, models.llama(hidden_size=16, num_hidden_layers=3), requests=REQUESTS[:1])


def test_what_has_no_tokens_is_not_kept():
    model = models.ConvNet()
    request = Request("conv", "output", None, statistics("error"))
    with pytest.raises(InfraError, match="the output of conv has no tokens of which some could be kept"):
        record_model(model, [torch.randn(2, 3, 8, 8)], [request], RecordOptions())
    experts = Request(r"experts\.\d+$", "output", None, statistics("error"))
    with pytest.raises(InfraError, match="isn't called for every sample"):
        record_model(Chooses(), [torch.zeros(1, 8).long(), torch.ones(1, 8).long()], [experts], RecordOptions())
    local = Request(r"layers\.0\.self_attn$", "output", None, statistics("local:32"))
    with pytest.raises(AnomalyError, match=r"layers\.0\.self_attn needs more than that"):
        record_model(models.llama(), BATCHES, [local], RecordOptions())


# The command, and suites that name its file.

SUITE = """\
model: {name: small, path: small-int8, reference: ref.qsa}
data: {num_samples: 4, seq_len: 32}
assertions:
  - {id: close, metric: kl_divergence, max: 10}
  - {id: blocks, metric: sqnr, layers: 'layers\\.\\d$', min: 0}
  - {id: alone, metric: local_sqnr, layers: 'down_proj$', min: 0}
  - {id: outliers, metric: new_outliers, layers: 'layers\\.\\d$', max: 10}
"""


@pytest.fixture(scope="module")
def gated(tmp_path_factory, llama, int8_llama):
    """A folder with a model, its original, a suite and the original kept as ref.qsa."""
    folder = tmp_path_factory.mktemp("gated") / "project"
    project = projects.Project(folder)
    shutil.copytree(int8_llama, folder / "small-int8")
    shutil.copytree(llama, folder / "small")
    project.write("gate.qsa.yaml", SUITE)
    keep(folder, "--model.path", str(folder / "small"))
    return project


def keep(folder, *options, suite="gate.qsa.yaml", output="ref.qsa"):
    arguments = ["--config", str(folder / suite), "-o", str(folder / output), "--for-reference", *options]
    assert main(["capture", *arguments]) == 0


def gate(folder, text=SUITE, samples=None):
    """Run what the assertions of a suite need, over all samples or some."""
    (folder / "case.qsa.yaml").write_text(text)
    file = load_suite(folder / "case.qsa.yaml")
    requests = [assertion.request for assertion in file.assertions]
    return capture_subject(subject_of(file), requests, share=SampleShare(samples=samples))


@pytest.fixture(scope="module")
def judged(gated):
    """What the suite's gate measures, all samples at once."""
    return gate(gated.folder)


@pytest.mark.process
def test_a_gate_needs_the_file_and_the_head_only(gated, judged):
    run = gated.pytest("gate.qsa.yaml", "--qsa-set=assertions.blocks.min=200")
    outcomes = {nodeid.rpartition("::")[2]: outcome for nodeid, outcome in run.outcomes.items()}
    assert outcomes == {"close": "passed", "blocks": "failed", "alone": "passed", "outliers": "passed"}, run.out
    assert re.search(r"model\.layers\.3 .* ≥ 200 .* 95 %: [\d.]+ … [\d.]+, from \d+ tokens", run.out)
    live = gate(gated.folder, SUITE.replace("ref.qsa", "small"))
    kept = judged
    np.testing.assert_allclose(kept.logits().kl_divergence().values, live.logits().kl_divergence().values, rtol=1e-2)
    series = kept.output(r"layers\.\d$").sqnr()
    assert set(series.intervals) == set(series.layers)
    np.testing.assert_array_equal(
        kept.output(r"layers\.\d$").new_outliers(3.0).values, live.output(r"layers\.\d$").new_outliers(3.0).values
    )


def test_parts_of_the_samples_merge_to_the_whole(gated, judged):
    parts = [gate(gated.folder, samples=part) for part in ((0, 1), (1, 4))]
    same = merge(parts).to_bytes() == judged.to_bytes()
    assert same


@pytest.mark.process
@pytest.mark.real_model
def test_smollm2_fits_in_twelve_megabytes_for_16_samples_and_predicts_as_both_models_do(smollm2, tmp_path):
    original, int8 = (str(smollm2 / name) for name in ("smollm2", "smollm2-int8"))
    text = SUITE.replace("small-int8", int8).replace("num_samples: 4, seq_len: 32", "num_samples: 2, seq_len: 512")
    text = text.replace("  - {id: alone, metric: local_sqnr, layers: 'down_proj$', min: 0}\n", "")
    (tmp_path / "gate.qsa.yaml").write_text(text)
    keep(tmp_path, "--model.path", original)
    assert (tmp_path / "ref.qsa").stat().st_size <= 12_000_000 * 2 / 16
    live, kept = (gate(tmp_path, text.replace("ref.qsa", name)) for name in (original, "ref.qsa"))
    for name in ("kl_divergence", "same_top", "delta_p", "ln_ppl_ratio"):
        one, other = (getattr(c.logits(), name)().values for c in (live, kept))
        np.testing.assert_allclose(other, one, rtol=1e-2)
    true, series = (c.output(r"layers\.\d$").sqnr() for c in (live, kept))
    np.testing.assert_allclose(series.values, true.values, atol=6)


def test_the_command_says_what_it_kept(gated, capsys):
    keep(gated.folder, "--model.path", str(gated.folder / "small"), "--with-head", "--rows", "2", output="head.qsa")
    said = capsys.readouterr().out
    assert "small, 2 tokens of each at 12 sites; the last hidden states of 128 tokens, with the head; 0." in said
    text = SUITE.replace("ref.qsa", str(gated.folder / "small"))
    (gated.folder / "live.qsa.yaml").write_text(text)
    keep(gated.folder, suite="live.qsa.yaml", output="same.qsa")  # the model that the suite names as its reference
    one, other = (ReferenceFile.open(gated.folder / name).header for name in ("ref.qsa", "same.qsa"))
    assert one["head"] == other["head"]
    assert one["streams"] == other["streams"]


def test_a_reference_is_kept_while_its_weights_are_read_from_disk(gated, judged):
    keep(
        gated.folder, "--model.path", str(gated.folder / "small"), "--memory.offload_device", "disk", output="disk.qsa"
    )
    one, other = (ReferenceFile.open(gated.folder / name) for name in ("ref.qsa", "disk.qsa"))
    assert one.calls.keys() == other.calls.keys()
    for call, entry in one.calls.items():
        if "rows" in entry:
            for rows, same in zip(one.rows(call)[0], other.rows(call)[0], strict=True):
                torch.testing.assert_close(rows, same, rtol=0, atol=0)
    streamed = gate(gated.folder, SUITE.replace("assertions", "memory: {offload_device: disk}\nassertions"))
    np.testing.assert_array_equal(streamed.logits().kl_divergence().values, judged.logits().kl_divergence().values)


def test_a_suite_may_not_be_its_own_reference(gated):
    with pytest.raises(
        SuiteError, match=r"gate.qsa.yaml:1: ref.qsa is made of the original: say where that is, --model"
    ):
        capture_command.run(["--config", str(gated.folder / "gate.qsa.yaml"), "-o", "x.qsa", "--for-reference"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--rows", "2"], "--rows is for a reference: give --for-reference as well"),
        (["--for-reference", "--samples", "0:2"], "--samples: a reference is kept of all samples in one run"),
        (["--for-reference", "--rows", "0"], "--rows 0: write a number from 1 to 4096"),
    ],
)
def test_options_that_do_not_fit_are_told(gated, options, text):
    with pytest.raises(SuiteError, match=text):
        capture_command.run(["--config", str(gated.folder / "gate.qsa.yaml"), "-o", "x.qsa", *options])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ref.qsa": "absent.qsa"}, "there is no file absent.qsa: make it of the original with `qsa capture"),
        ({"ref.qsa": "plain.qsa"}, "plain.qsa is a capture without rows to compare with"),
        ({"ref.qsa": "short.qsa"}, "short.qsa can't be read as a kept reference"),
        ({"ref.qsa": "gone.qsa"}, "gone.qsa: the reference's head is read from away, which isn't here: bring that"),
        ({"ref.qsa": "changed.qsa"}, "lm_head.weight in other, isn't what it was when the reference was kept: bring"),
        ({"seq_len: 32": "seq_len: 32, seed: 3"}, r"other tokens: sample 0 \(and 3 more\) isn't among its 4 samples"
         r" \(4 × 32 tokens of sample, seed 0\); give the suite the data and tokenizer"),
        ({"down_proj": "o_proj"}, r"ref.qsa holds no rows of the output of model.layers.0.self_attn.o_proj: make it"),
    ],
    ids=["absent", "no reference", "cut short", "head gone", "head changed", "other data", "other site"],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(gated, change, text):
    made_for_errors(gated.folder)
    suite = SUITE
    for old, new in change.items():
        suite = suite.replace(old, new)
    with pytest.raises(QsaError, match=text) as caught:
        gate(gated.folder, suite)
    assert "\n" not in str(caught.value)


def made_for_errors(folder):
    """Make a plain capture, a file that is cut short, and two whose head's checkpoint is gone or another."""
    if (folder / "plain.qsa").exists():
        return
    capture(models.llama(), BATCHES[:1], sites=[(BLOCKS, "output")], statistics=["absmax"]).save(folder / "plain.qsa")
    content = (folder / "ref.qsa").read_bytes()
    (folder / "short.qsa").write_bytes(content[:-100])
    checkpoints.edited(folder / "small", folder / "other", lambda weights: weights["lm_head.weight"].mul_(1.5))
    for name, place in (("gone.qsa", "away"), ("changed.qsa", "other")):
        moved = with_header(content, lambda header, place=place: header["head"].update(path=place))
        (folder / name).write_bytes(moved)


def test_a_changed_byte_anywhere_in_a_kept_reference_is_told(gated):
    content, file = (gated.folder / "ref.qsa").read_bytes(), gated.folder / "flipped.qsa"
    seen = []
    for at in random.Random(15).sample(range(len(content)), 60):
        file.write_bytes(flipped(content, at))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                ReferenceFile.open(file)
            except InfraError as error:
                told.append(error)
        seen += [] if told else [at]
    assert seen == []


def test_a_kept_reference_without_a_checksum_is_read_with_a_warning(gated):
    file = gated.folder / "old.qsa"
    file.write_bytes(without_checksum((gated.folder / "ref.qsa").read_bytes()))
    with pytest.warns(QsaWarning, match="old.qsa has no checksum, as those of earlier versions"):
        ReferenceFile.open(file)


def test_another_tokenizer_is_named(gated):
    header = ReferenceFile.open(gated.folder / "ref.qsa")
    own = Provenance(ModelProvenance(tokenizer="Other, 5 entries"))
    assert re.search(r"of the tokenizer \w+, 320 entries, sha256 \w+, here Other, 5 entries\)$", header.origin(own))


@pytest.mark.parametrize(
    ("assertion", "text"),
    [
        (
            "metric: weight_sqnr, layers: q_proj, min: 3",
            "case.qsa.yaml:4: weight_sqnr reads weights, and ref.qsa holds",
        ),
        ("metric: sqnr, by: channel, layers: q_proj, min: 3", "case.qsa.yaml:4: by: channel sums up every token, and"),
    ],
)
def test_what_some_tokens_can_not_answer_is_told_at_its_line(gated, assertion, text):
    with pytest.raises(SuiteError, match=re.escape(text)):
        gate(gated.folder, SUITE[: SUITE.index("  - {id: close")] + f"  - {{id: it, {assertion}}}\n")


class Chooses(torch.nn.Module):
    """Calls one of two experts for a sample, by its first token."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Embedding(64, 8) for _ in range(2))

    def forward(self, ids):
        return self.experts[int(ids[0, 0]) % 2](ids)
