"""`qsa selftest`: faults in lazy copies of a checkpoint, and what a suite says of them."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pytest_qsa.checkpoint.checks.health import Files, problems_of
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.checkpoint.tensors import decoded, encoded
from pytest_qsa.cli import main
from pytest_qsa.common.errors import SuiteError
from pytest_qsa.engine.load.data import batches_of
from pytest_qsa.suite import Data, Subject, load_suite
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant
from pytest_qsa.tools.selftest.recording import RESULTS
from pytest_qsa.tools.selftest.run import (
    PERPLEXITY_ID,
    PerplexityGate,
    Selftest,
    chosen,
    judge_perplexity,
    makes_a_pass,
    middle_of,
    perplexity_suite,
    score_of,
    smallest_caught,
)
from pytest_qsa.tools.selftest.table import lines_of, markdown_of
from support.checkpoints import edited, save_gguf, save_quantized_llama
from support.paths import ROOT
from support.projects import Project, suite

DOWN = "model.layers.2.mlp.down_proj"
QUIET = ("-p", "no:randomly", "-p", "no:hypothesispytest", "-p", "no:anyio")


@pytest.fixture(scope="module")
def int4_llama(tmp_path_factory, llama):
    """Return the small Llama in 4 bits with zero points, groups of 16."""
    folder = tmp_path_factory.mktemp("int4") / "int4"
    return save_quantized_llama(folder, llama, "W4A16", group_size=16, symmetric=False)


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """Return a folder with what the Llama lacks: experts, a bias of keys, a tokenizer that puts BOS in front."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("special")
    weights = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": torch.randn(8, 4) for i in range(3)}
    weights["model.layers.0.self_attn.k_proj.weight"] = torch.randn(8, 4)
    weights["model.layers.0.self_attn.k_proj.bias"] = torch.randn(8)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    (folder / "tokenizer.json").write_text(json.dumps({"post_processor": {"type": "TemplateProcessing"}}))
    return folder


def mutated(source, target, fault, layer, strength=None):
    """Return the tensors of a copy with a fault, as safetensors itself reads them."""
    mutant = Mutant(open_folder(source))
    FAULTS[fault].inject(mutant, layer, FAULTS[fault].default if strength is None else strength)
    assert mutant.changed
    mutant.save(target)
    return load_file(target / "model.safetensors")


def changed(before, after):
    return {
        name for name in {*before, *after}
        if name not in before or name not in after or not torch.equal(before[name].cpu(), after[name].cpu())
    }  # fmt: skip


def test_a_copy_links_what_is_untouched_and_rewrites_what_is_not(int8_llama, tmp_path):
    originals = {file.name: file.read_bytes() for file in int8_llama.iterdir()}
    mutated(int8_llama, tmp_path / "copy", "scale_layer", DOWN)
    own = {file.name for file in (tmp_path / "copy").iterdir() if not file.is_symlink()}
    assert own == {"model.safetensors"}
    assert {file.name for file in (tmp_path / "copy").iterdir()} == set(originals)
    assert {file.name: file.read_bytes() for file in int8_llama.iterdir()} == originals


def test_of_a_sharded_checkpoint_only_the_touched_shard_is_rewritten(int8_llama, tmp_path):
    sharded = edited(int8_llama, tmp_path / "sharded")
    weights = load_file(sharded / "model.safetensors")
    shards = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for index, name in enumerate(weights):
        shards[f"model-{index % 2 + 1}.safetensors"][name] = weights[name]
    for file, part in shards.items():
        save_file(part, sharded / file)
    (sharded / "model.safetensors").unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    mutant = Mutant(open_folder(sharded))
    FAULTS["scale_dropped"].inject(mutant, DOWN, 1.0)
    copy = mutant.save(tmp_path / "copy")
    own = {file.name for file in copy.iterdir() if not file.is_symlink()}
    assert own == {weight_map[f"{DOWN}.weight_scale"], "model.safetensors.index.json"}
    assert set(open_folder(copy).indexed) == set(weight_map) - {f"{DOWN}.weight_scale"}


QUERY, KEY = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
EXPECTED = {
    # fault: the tensors that it may touch, and what each must then be, computed with torch from the original's
    "scale_layer": (DOWN, lambda w: {f"{DOWN}.weight_scale": w[f"{DOWN}.weight_scale"] * 2}),
    "scale_dropped": (DOWN, lambda w: {f"{DOWN}.weight_scale": None}),
    "layer_unquantized": (
        DOWN,
        lambda w: {
            f"{DOWN}.weight": (w[f"{DOWN}.weight"].double() * w[f"{DOWN}.weight_scale"]).bfloat16(),
            f"{DOWN}.weight_scale": None,
        },
    ),
    "rows_permuted": (DOWN, lambda w: {f"{DOWN}.weight": w[f"{DOWN}.weight"].roll(1, 0)}),
    "signs_lost": (DOWN, lambda w: {f"{DOWN}.weight": w[f"{DOWN}.weight"].clamp(min=-127).abs()}),
    "zero_point_shifted": (
        DOWN, lambda w: {f"{DOWN}.weight": (w[f"{DOWN}.weight"].int() + 1).clamp(max=127).to(torch.int8)},
    ),
    "weights_constant": (
        DOWN, lambda w: {f"{DOWN}.weight": torch.full_like(w[f"{DOWN}.weight"], w[f"{DOWN}.weight"][0, 0])},
    ),
    "scales_swapped": (
        QUERY,
        lambda w: {
            f"{QUERY}.weight_scale": torch.cat([w[f"{KEY}.weight_scale"], w[f"{QUERY}.weight_scale"][16:]]),
            f"{KEY}.weight_scale": w[f"{QUERY}.weight_scale"][:16],
        },
    ),
    "norm_scaled": ("model.norm", lambda w: {"model.norm.weight": w["model.norm.weight"] * 1.5}),
}  # fmt: skip


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_changes_what_it_says_and_nothing_else(int8_llama, tmp_path, fault):
    layer, expect = EXPECTED[fault]
    before = load_file(int8_llama / "model.safetensors")
    after = mutated(int8_llama, tmp_path / "copy", fault, layer)
    expected = expect(before)
    assert changed(before, after) <= set(expected)
    for name, tensor in expected.items():
        if tensor is None:
            assert name not in after
        else:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor), name


def test_scales_with_their_outputs_in_columns_are_swapped_as_far_as_both_layers_have_them(tmp_path):
    source, parts = tmp_path / "gptq", ("qweight", "qzeros", "scales")
    source.mkdir()
    outputs = {QUERY: 32, KEY: 16}
    weights = {
        f"{layer}.{part}": torch.randn(2, count).half() if part == "scales" else torch.ones(2, count, dtype=torch.int32)
        for layer, count in outputs.items()
        for part in parts
    }
    save_file(weights, source / "model.safetensors")
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 8}
    (source / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    after = mutated(source, tmp_path / "copy", "scales_swapped", QUERY)
    query, key = weights[f"{QUERY}.scales"], weights[f"{KEY}.scales"]
    assert torch.equal(after[f"{QUERY}.scales"], torch.cat([key, query[:, 16:]], dim=1))
    assert torch.equal(after[f"{KEY}.scales"], query[:, :16])


def test_faults_of_single_scales_touch_that_many(int8_llama, tmp_path):
    name = f"{DOWN}.weight_scale"
    before = load_file(int8_llama / "model.safetensors")[name]
    for fault, strength, check in (
        ("scale_channel", 8, lambda new: int((new == before * 8).sum()) == 1),
        ("zero_scale", 3, lambda new: int((new == 0).sum()) == 3),
        ("nan_scale", 1, lambda new: int(new.isnan().sum()) == 1),
        ("outlier_clipped", 4, lambda new: bool(new[before.argmax()] == before.max() / 4)),
    ):
        new = mutated(int8_llama, tmp_path / fault, fault, DOWN, strength)[name]
        assert check(new), fault
        assert int((new != before).sum()) == (3 if fault == "zero_scale" else 1)


def test_exchanged_blocks_have_each_others_weights_and_scales(int8_llama, tmp_path):
    before = load_file(int8_llama / "model.safetensors")
    after = mutated(int8_llama, tmp_path / "copy", "weights_exchanged", DOWN)
    other = "model.layers.3.mlp.down_proj"
    for part in ("weight", "weight_scale"):
        assert torch.equal(after[f"{DOWN}.{part}"], before[f"{other}.{part}"])
        assert torch.equal(after[f"{other}.{part}"], before[f"{DOWN}.{part}"])


def test_swapped_nibbles_and_shifted_zero_points_are_those_of_every_packed_number(int4_llama, tmp_path):
    before = load_file(int4_llama / "model.safetensors")

    def unpacked(words):
        return (words.numpy().view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15

    after = mutated(int4_llama, tmp_path / "nibbles", "nibbles_swapped", DOWN)
    old, new = unpacked(before[f"{DOWN}.weight_packed"]), unpacked(after[f"{DOWN}.weight_packed"])
    np.testing.assert_array_equal(new, old.reshape(*old.shape[:-1], 4, 2)[..., ::-1].reshape(old.shape))
    after = mutated(int4_llama, tmp_path / "zero", "zero_point_shifted", DOWN)
    old, new = unpacked(before[f"{DOWN}.weight_zero_point"]), unpacked(after[f"{DOWN}.weight_zero_point"])
    np.testing.assert_array_equal(new, (old + 1) % 16)


def test_experts_biases_and_bos_are_broken_where_a_checkpoint_has_them(special, llama, tmp_path):
    before = load_file(special / "model.safetensors")
    expert = "model.layers.0.mlp.experts.1.up_proj"
    assert changed(before, mutated(special, tmp_path / "expert", "expert_reinitialised", expert)) == {
        f"{expert}.weight"
    }
    key = "model.layers.0.self_attn.k_proj"
    after = mutated(special, tmp_path / "bias", "kv_bias_dropped", key)
    assert changed(before, after) == {f"{key}.bias"}
    assert not after[f"{key}.bias"].any()
    mutated(special, tmp_path / "bos", "bos_dropped", "tokenizer")
    assert json.loads((tmp_path / "bos" / "tokenizer_config.json").read_text()) == {"add_bos_token": False}
    assert json.loads((tmp_path / "bos" / "tokenizer.json").read_text()) == {"post_processor": None}
    for fault in ("expert_reinitialised", "kv_bias_dropped", "bos_dropped"):
        assert list(FAULTS[fault].targets(open_folder(llama))) == []


def test_rows_of_the_embedding_are_zeroed(llama, tmp_path):
    for strength in (1, 5):
        after = mutated(llama, tmp_path / str(strength), "embedding_zeroed", "model.embed_tokens", strength)
        assert int((after["model.embed_tokens.weight"] == 0).all(dim=1).sum()) == strength


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("BF16", torch.bfloat16), ("F16", torch.float16), ("F8_E4M3", torch.float8_e4m3fn)],
)
def test_numbers_are_rounded_as_torch_does(name, dtype):
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    expected = values.float().to(dtype).float().numpy()
    np.testing.assert_array_equal(decoded(encoded(values.float().double().numpy(), name), name), expected)


class Judged(Selftest):
    """A self-test whose runs judge by the static check itself, in this process."""

    def _pytest(self, checkpoint, file, suites):
        found = problems_of(Files(open_folder(checkpoint)), "checkpoint_health")[1]
        layers = [finding.layer for finding in found]
        return [{"test": "a::files", "kind": "REGRESSION", "failed": bool(found), "loaded": True, "layers": layers}]


def outcomes(folder, *names, **settings):
    test = Judged(folder / "a.qsa.yaml", open_folder(folder), **settings)
    return list(test.run(chosen(names), lambda text: None))


def test_what_slips_through_is_bisected_to_the_smallest_strength_that_is_caught(int8_llama, tmp_path):
    (slipped,) = outcomes(int8_llama, "scale_layer", layers=r"layers\.2\.mlp\.down_proj$")
    assert slipped.caught == ()
    assert 2 < slipped.smallest < 16

    def caught(factor):
        mutant = Mutant(open_folder(int8_llama))
        FAULTS["scale_layer"].inject(mutant, DOWN, factor)
        copy = mutant.save(tmp_path / f"{factor}")
        return bool(problems_of(Files(open_folder(copy)), "checkpoint_health")[1])

    step = (16 / 2) ** (1 / 2**4)  # four halvings of the octaves between 2 and 16
    assert caught(slipped.smallest)
    assert not caught(slipped.smallest / step)


def test_bisecting_everything_goes_below_the_default(int8_llama):
    (caught,) = outcomes(int8_llama, "scale_channel", bisect="all")
    assert [catch.test for catch in caught.caught] == ["files"]
    assert 1 < caught.smallest < 8
    (single,) = outcomes(int8_llama, "scale_channel", bisect="none")
    assert single.smallest is None


def test_a_fault_that_no_strength_betrays_says_so(int8_llama):
    (slipped,) = outcomes(int8_llama, "norm_scaled")
    assert (slipped.caught, slipped.smallest, slipped.strongest) == ((), None, 16.0)


def test_the_score_counts_what_could_be_done(int8_llama):
    found = outcomes(int8_llama, "nan_scale", "rows_permuted", "nibbles_swapped")
    assert [bool(outcome.skipped) for outcome in found] == [False, False, True]
    assert score_of(found) == 0.5
    assert found[0].named
    with pytest.raises(SuiteError, match="nothing to score"):
        score_of(found[2:])


@pytest.mark.parametrize(("low", "high", "whole", "middle"), [(2, 8, False, 4), (0, 1, False, 0.5), (1, 4, True, 2)])
def test_the_middle_of_two_strengths(low, high, whole, middle):
    assert middle_of(low, high, whole=whole) == middle


@pytest.mark.parametrize(
    ("least", "low", "high", "whole", "found"),
    [
        (3.0, 2.0, 16.0, False, 2 * 8 ** (1 / 4)),
        (16.0, 2.0, 16.0, False, 16.0),
        (3.0, 1.0, 4.0, True, 3.0),
        (1.0, 0.0, 1.0, True, 1.0),
    ],
)
def test_bisection_finds_the_smallest_strength_that_is_known_to_be_caught(least, low, high, whole, found):
    assert smallest_caught(lambda strength: strength >= least, low, high, whole=whole) == pytest.approx(found)


@pytest.fixture(scope="module")
def tested(tmp_path_factory, int8_llama):
    """Run the command as a user does, on a suite of static checks."""
    folder = tmp_path_factory.mktemp("tested")
    (folder / "a.qsa.yaml").write_text(suite(int8_llama, "id: files, metric: checkpoint_health"))
    words = ["selftest", folder / "a.qsa.yaml", "--faults", "nan_scale,rows_permuted", "--min-score", "0.9"]
    return folder, [*map(str, [*words, "--output", folder / "out"]), "--", *QUIET]


@pytest.mark.process
def test_the_command_prints_the_table_and_fails_below_the_score(tested, capsys):
    folder, words = tested
    assert main(words) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[1].split() == [
        "nan_scale", "model.layers.2.mlp.down_proj", "1", "scale", "files", "yes", "1", "scale",
    ]  # fmt: skip
    assert "SLIPPED THROUGH" in lines[2]
    assert lines[3] == "mutation score 50%: 1 of 2 faults are caught, 1 of them with their layer named"
    assert "--min-score asks for 90%" in captured.err
    content = json.loads((folder / "out" / "selftest.json").read_text())
    assert content["schema"] == "qsa-selftest/1"
    assert content["score"] == 0.5
    assert [fault["caught"] for fault in content["faults"]] == [
        [{"test": "files", "kind": "REGRESSION", "named": True, "loaded": True}], [],
    ]  # fmt: skip
    assert content["faults"][0]["perplexity"] is None
    assert r"| rows\_permuted |" in (folder / "out" / "selftest.md").read_text()
    page = (folder / "out" / "selftest.html").read_text()
    assert "slipped through" in page
    assert "rows_permuted" in page


class Forked(Selftest):
    """A self-test whose runs are forks of a process that has imported torch."""

    project = None

    def _pytest(self, checkpoint, file, suites):
        words = (*suites, f"--qsa-model={checkpoint}", "--qsa-report=never", "--qsa-no-cache")
        plugin = ("-p", "pytest_qsa.tools.selftest.recording")
        assert self.project.pytest(*words, *plugin, environment={RESULTS: str(file)}).code in (0, 1)
        return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def beside(tmp_path_factory, int8_llama):
    """Run the faults of a suite with a pass, and the gate on perplexity beside it; return the outcomes by fault."""
    Forked.project = Project(tmp_path_factory.mktemp("beside") / "project")
    text = suite(
        int8_llama, "id: files, metric: checkpoint_health", "id: d, metric: absmax, site: output, layers: q, max: 99"
    )
    file = load_suite(Forked.project.write("a.qsa.yaml", text))
    test = Forked(file.path, open_folder(int8_llama), perplexity=perplexity_suite(file), bisect="none")
    faults = chosen(["scale_layer", "embedding_zeroed", "nan_scale", "scale_dropped"])
    return {outcome.fault: outcome for outcome in test.run(faults, lambda text: None)}


def perplexity_of(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.cat([batch["input_ids"] for batch in batches_of(Data(num_samples=2, seq_len=32), tokenizer, folder)])
    with torch.no_grad():
        nll = -model(ids).logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    return float(nll.mean().exp())


@pytest.mark.process
def test_a_gate_on_perplexity_is_told_from_the_same_run(beside, int8_llama, tmp_path):
    mutant = Mutant(open_folder(int8_llama))
    FAULTS["scale_layer"].inject(mutant, beside["scale_layer"].layer, 2.0)
    expected = perplexity_of(mutant.save(tmp_path / "copy")) / perplexity_of(int8_llama)
    gate = beside["scale_layer"].perplexity
    assert gate.ratio == pytest.approx(expected, rel=1e-5)
    assert gate.caught == (expected > 1.02)
    assert str(beside["nan_scale"].perplexity) == "no sound number, caught"
    assert str(beside["scale_dropped"].perplexity) == "does not run, caught"
    assert not beside["embedding_zeroed"].perplexity.caught
    assert not any(catch.test.startswith(PERPLEXITY_ID) for outcome in beside.values() for catch in outcome.caught)


@pytest.mark.process
def test_the_table_has_both_gates_and_both_scores(beside):
    lines = list(lines_of(list(beside.values())))
    assert lines[0].endswith("perplexity (≤ 1.02)")
    assert "SLIPPED THROUGH" in lines[2]
    assert lines[2].endswith(", missed")
    caught = sum(outcome.perplexity.caught for outcome in beside.values())
    assert lines[-2].startswith("mutation score 50%: 2 of 4")
    assert lines[-1].endswith(f"catches {caught} of 4, {caught / 4:.0%}")
    assert "does not run, caught |" in markdown_of(list(beside.values()))


@pytest.mark.parametrize(
    ("result", "healthy", "gate"),
    [
        ({"failed": False, "value": 10.2}, 10.0, PerplexityGate(1.02)),
        ({"failed": True, "loaded": False, "value": None}, 10.0, PerplexityGate(None, "does not run")),
        ({"failed": True, "loaded": True, "value": None}, 10.0, PerplexityGate(None, "no sound number")),
        (None, 10.0, None),
        ({"failed": False, "value": 10.2}, None, None),
    ],
)
def test_what_the_gate_on_perplexity_says(result, healthy, gate):
    assert judge_perplexity(result, healthy) == gate


def test_the_gate_on_perplexity_allows_two_hundredths():
    assert [PerplexityGate(ratio).caught for ratio in (0.9, 1.02, 1.0201, None)] == [False, False, True, True]


def test_the_perplexity_is_of_the_very_subject_of_the_suite(tmp_path):
    """One subject has one pass: nothing that a suite names relative to its folder may get lost."""
    for name in ("original", "texts"):
        (tmp_path / "gates" / name).mkdir(parents=True)
    text = (
        "model: {name: a, path: x, reference: original, dtype: float32}\n"
        "data: {source: 'custom:texts', num_samples: 3, batch_size: 3}\nmemory: {device: cpu}\n"
        "assertions: [{id: a, metric: same_top, min: 0}]\n"
    )
    (tmp_path / "gates" / "a.qsa.yaml").write_text(text)
    (tmp_path / "b.qsa.yaml").write_text(perplexity_suite(load_suite(tmp_path / "gates" / "a.qsa.yaml")))
    keys = set()
    for file in ("gates/a.qsa.yaml", "b.qsa.yaml"):
        loaded = load_suite(tmp_path / file)
        parts = loaded.suite
        keys.add(Subject("a", parts.model, parts.data, parts.memory, loaded.path.parent, "/copy").key)
        assert makes_a_pass(loaded)
    assert len(keys) == 1
    (tmp_path / "c.qsa.yaml").write_text(suite("x", "id: files, metric: checkpoint_health"))
    assert not makes_a_pass(load_suite(tmp_path / "c.qsa.yaml"))


@pytest.mark.process
def test_a_suite_that_fails_on_the_healthy_checkpoint_tests_nothing(tested, int8_llama, tmp_path, capsys):
    broken = edited(int8_llama, tmp_path / "broken", lambda weights: weights[f"{DOWN}.weight_scale"].zero_())
    assert main([*tested[1][:2], "--model", str(broken), "--", *QUIET]) == 2
    assert "fails on the checkpoint as it is (files, REGRESSION)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--faults", "nan_scal"], 2, "did you mean 'nan_scale'"),
        (["--min-score", "95"], 4, "95 is not between 0 and 1"),
        (["--model", "nobody/nothing"], 1, "no hub id in the local cache"),
    ],
)
def test_a_wrong_usage_is_told(tested, capsys, words, code, text):
    assert main([*tested[1][:2], *words]) == code
    assert text in capsys.readouterr().err


def test_every_fault_is_listed_and_documented(capsys):
    assert main(["selftest", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(FAULTS)
    text = (ROOT / "docs" / "selftest.md").read_text(encoding="utf-8")
    assert [name for name in FAULTS if f"`{name}`" not in text] == []


@pytest.mark.process
def test_faults_are_put_into_a_gguf_file_and_named_by_the_names_of_the_model(llama, tmp_path, capsys):
    folder = save_gguf(tmp_path / "gguf", llama)
    written = suite(
        folder, "id: files, metric: checkpoint_scales", "id: close, metric: weight_sqnr, layers: ffn_, min: 30"
    )
    keys = f"gguf_file: model.gguf, weights: files, reference: {llama}, name"
    (tmp_path / "gguf.qsa.yaml").write_text(written.replace("{name", f"{{{keys}"))
    before = (folder / "model.gguf").read_bytes()
    faults = ["--faults", "nan_scale,rows_permuted", "--layers", "ffn_", "--bisect", "none", "--no-perplexity"]
    assert main(["selftest", str(tmp_path / "gguf.qsa.yaml"), *faults, "--min-score", "1", "--", *QUIET]) == 0
    out = capsys.readouterr().out
    assert out.count("yes") == 2, out
    assert (folder / "model.gguf").read_bytes() == before
