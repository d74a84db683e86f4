"""`qsa init`: a first suite, calibrated, that a team can commit."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml

from pytest_qsa import capture
from pytest_qsa.captures import match_layers
from pytest_qsa.checkpoint import problems_of
from pytest_qsa.cli import main
from pytest_qsa.engine.load.data import batches_of
from pytest_qsa.engine.load.outline import anatomy
from pytest_qsa.suite import Anatomy, Data, Model, files_of, load_suite, subject_of
from pytest_qsa.tools.draft import cache_drafts, measured_drafts, sinks_of, with_gain_bound, with_tolerance
from support import models
from support.checkpoints import edited, save_gguf, save_llama
from support.projects import Project

SMALL = ("--parts", "4", "--data.num_samples", "2", "--data.seq_len", "24", "--memory.device", "cpu")


@pytest.fixture(scope="module")
def first(tmp_path_factory, int8_llama):
    """Write a first suite of the small int8 Llama, from the folder above; return the user's project."""
    project = Project(tmp_path_factory.mktemp("init") / "project")
    out = project.folder / "out.txt"
    with pytest.MonkeyPatch.context() as patch, out.open("w") as stream:
        patch.chdir(project.folder.parent)
        patch.setattr("sys.stdout", stream)
        assert main(["init", str(int8_llama), "-o", "project/gate.qsa.yaml", *SMALL]) == 0
    return project


def test_every_assertion_says_why_it_is_there(first):
    lines = first.read("gate.qsa.yaml").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("  - id: ")]
    ids = [lines[number].partition(": ")[2] for number in starts]
    assert ids == [
        "files", "finite", "residual-outliers", "outliers-beside-the-sinks", "drift", "weight-scales",
        "weights-without-bias",
    ]  # fmt: skip
    assert all(lines[number - 1].startswith("  # ") for number in starts)


def test_what_the_command_line_said_stands_in_it_and_paths_are_relative_to_it(first, int8_llama):
    sections = yaml.safe_load(first.read("gate.qsa.yaml"))
    assert (first.folder / sections["model"]["path"]).resolve() == int8_llama.resolve()
    assert sections["model"]["path"].startswith("..")
    assert sections["data"] == {"source": "sample", "num_samples": 2, "seq_len": 24, "seed": 0}
    assert sections["memory"] == {"device": "cpu"}


def test_its_bounds_are_calibrated(first):
    assertions = {a.id: a for a in load_suite(first.folder / "gate.qsa.yaml").assertions}
    for name in ("residual-outliers", "outliers-beside-the-sinks", "weights-without-bias"):
        assert assertions[name].noise.max.n == 4, name
        assert assertions[name].max >= assertions[name].noise.max.floor("max")
    assert assertions["weights-without-bias"].noise.min.sigma == 0


@pytest.mark.process
def test_it_passes_on_its_model_once_its_baselines_are_made(first):
    assert "pytest project/gate.qsa.yaml --snapshot-update" in first.read("out.txt")
    assert first.pytest("gate.qsa.yaml", "--qsa-cache=cache", "--snapshot-update").code == 0
    run = first.pytest("gate.qsa.yaml", "--qsa-cache=cache", "--qsa-report=never")
    assert run.code == 0, run.out
    assert set(run.outcomes.values()) == {"passed"}


def test_a_quantized_cache_has_a_suite_in_one_command(first, int8_llama, monkeypatch, capsys):
    monkeypatch.chdir(first.folder)
    assert main(["init", str(int8_llama), "--kv-cache", "int8_per_token_head", "-o", "kv.qsa.yaml", *SMALL]) == 0
    file = load_suite(first.folder / "kv.qsa.yaml")
    own = (file.suite.model.kv_cache, file.suite.model.reference, file.suite.data.source)
    assert own == ("int8_per_token_head", "self", "document")
    own = {each.id: each for each in file.assertions}
    # No decision of a random model is sure.
    assert [*own] == ["files", "cache-costs-little", "nor-more-with-depth", "key-fits", "value-fits"]
    assert "left out: sure-decisions-kept: no position has a margin" in capsys.readouterr().out
    assert own["nor-more-with-depth"].where == "range:12:"
    assert {"scheme": "int8", "by": "token_head"}.items() <= own["key-fits"].parameters.items()
    assert own["key-fits"].min > 25
    assert own["cache-costs-little"].noise.max.n == 4


def test_a_latent_cache_is_gated_at_what_it_keeps():
    anatomy = Anatomy(["model.layers.0", "model.layers.1"], [])
    drafts = cache_drafts("fp8_e4m3", anatomy, ("latent", "rope_key"), 512)
    fits = {each.keys["id"]: each.keys for each in drafts if "site" in each.keys}
    assert [*fits] == ["latent-fits", "rope-key-fits", "latent-not-clipped", "rope-key-not-clipped"]
    asked = fits["rope-key-fits"]
    assert (asked["layers"], asked["site"], asked["by"]) == ("kind:attention", "rope_key", "checkpoint")


def test_a_file_that_is_there_stays_without_force(first, int8_llama, monkeypatch, capsys):
    monkeypatch.chdir(first.folder)
    before = first.read("gate.qsa.yaml")
    assert main(["init", str(int8_llama), "-o", "gate.qsa.yaml", *SMALL]) == 1
    assert "gate.qsa.yaml exists: give --force to replace it, or another -o" in capsys.readouterr().err
    assert first.read("gate.qsa.yaml") == before


def test_a_file_that_pytest_would_not_collect_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "nowhere", "-o", "gate.txt", *SMALL]) == 2
    assert (
        "-o gate.txt: pytest takes suites from .yaml and .yml files alone: name it gate.qsa.yaml"
        in capsys.readouterr().err
    )


def test_a_model_that_is_nowhere_leaves_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "./nowhere", *SMALL]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_suite_of_a_checkpoint_that_nothing_here_loads_reads_its_files_alone(tmp_path, monkeypatch, quantized, llama):
    monkeypatch.chdir(tmp_path)
    unloadable = tmp_path / "int4 + kv"  # a name that a model in a suite can't have
    unloadable.symlink_to(quantized["int4 with zero points"])
    named = ["--reference", str(llama), "--model.weights", "files", "-o", "gate.qsa.yaml"]
    assert main(["init", str(unloadable), *named]) == 0
    file = load_suite(tmp_path / "gate.qsa.yaml")
    assert (file.suite.model.name, file.suite.model.weights) == ("int4---kv", "files")
    ids = ["files", "unquantized", "weight-scales", "weights-without-bias", "weights-close", "rows-close"]
    ids.append("groups-keep-their-size")
    assert [assertion.id for assertion in file.assertions] == ids
    assert all(assertion.site == "weight" for assertion in file.assertions[2:])
    assert min(file.assertions[4].min.values()) > 5


def test_a_gguf_s_suite_of_its_files_goes_by_the_names_in_the_file(tmp_path, monkeypatch, llama, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_gguf(tmp_path / "gguf", llama)
    named = ["--reference", str(llama), "--model.gguf_file", "model.gguf", "--model.weights", "files"]
    assert main(["init", str(folder), *named, "-o", "g.qsa.yaml"]) == 0
    file = load_suite(tmp_path / "g.qsa.yaml")
    kinds = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert file.assertions[1].id == "unquantized"
    assert {assertion.layers for assertion in file.assertions[2:]} == {rf"\.({'|'.join(kinds)})$"}
    checked = files_of(subject_of(file))
    assert problems_of(checked, "checkpoint_unquantized")[1] == []


def test_a_tower_that_no_text_passes_is_in_the_assertions_on_weights_alone(tmp_path):
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **small},
        text_config={"model_type": "llama", "vocab_size": 320, **small},
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path)
    layers = anatomy(Model(name="llava", path=str(tmp_path)), str(tmp_path))
    assert layers.towers == ["model.vision_tower"]
    assert layers.block_pattern == r"^model\.language_model\.layers\.\d+$"
    for draft in measured_drafts(layers, "layers"):
        pattern, exclude = (draft.keys.get(key) for key in ("layers", "exclude"))
        found = match_layers(layers.weights, pattern, exclude) if pattern else []
        if draft.keys.get("site") == "weight":
            assert "model.vision_tower.encoder.layers.0.mlp.fc1" in found
        assert draft.keys.get("site") == "weight" or not [name for name in found if "vision" in name]
    alone = Anatomy(["encoder.layers.0", "encoder.layers.1"], ["encoder.layers.0.mlp.fc1"])
    assert not any("exclude" in draft.keys for draft in measured_drafts(alone, "layers"))


class OfBits:
    """A format whose layers have some bits a weight each. `by_gptq`: what says that GPTQ made it."""

    def __init__(self, by_gptq, *bits):
        self.folder = SimpleNamespace(by_gptq=by_gptq)
        self.bits = dict(zip(TWO_KINDS, bits, strict=True))

    def layers_of(self, modules):
        return {name: name for name in modules}

    def weight_bits(self, layer):
        return self.bits[layer]


TWO_KINDS = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("bits", "by_gptq", "bound"),
    [
        ((8, 8, 5), "", 1), ((4, 4, 4), "", 1.25), ((2, 2, 1), "", 4), ((16, 16, 16), "", 1),
        ((4, 3, 8), "", {r"\.down_proj$": 2, r"\.up_proj$": 1}), ((4, 4, 4), "recipe.yaml", 2),
        ((8, 8, 8), "recipe.yaml", 1),
    ],
)  # fmt: skip
def test_groups_of_fewer_bits_have_the_room_that_rounding_to_them_takes(bits, by_gptq, bound):
    anatomy = Anatomy(["model.layers.0", "model.layers.1"], TWO_KINDS)
    drafts = [with_gain_bound(draft, anatomy, OfBits(by_gptq, *bits)) for draft in measured_drafts(anatomy, "layers")]
    assert [draft.keys["max"] for draft in drafts if draft.keys["metric"] == "weight_gain"] == [bound]


def test_a_sink_that_every_sample_has_is_gated_where_it_is_clear():
    model = models.llama(sink=True)
    anatomy = Anatomy([f"model.layers.{index}" for index in range(4)], ["model.layers.0.mlp.down_proj"])
    batches = [models.token_batch(3, 24, seed=seed, bos=True) for seed in range(2)]
    seen = capture(model, batches, sites=[(anatomy.block_pattern, "output")])
    (draft,) = sinks_of(seen, anatomy)
    assert draft.keys["equals"] == models.SINK_CHANNEL
    assert seen.output(draft.keys["layers"]).sink_tokens("ratio").values.min() >= 128
    without = [models.token_batch(2, 24, bos=True), models.token_batch(1, 24)]
    assert sinks_of(capture(model, without, sites=[(anatomy.block_pattern, "output")]), anatomy) == []


# Against an original.

AGAINST = [
    "files", "unquantized", "finite", "residual-outliers", "outliers-beside-the-sinks", "drift", "weight-scales",
    "weights-without-bias", "weights-close", "rows-close", "groups-keep-their-size", "layers-alone", "blocks-close",
    "new-outliers", "predictions-close", "predictions-close-everywhere", "same-words",
    "decisions-kept", "perplexity",
]  # fmt: skip
DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def against(tmp_path_factory, int8_llama, llama):
    """Write a first suite of the small int8 Llama against the one it was made from."""
    project = Project(tmp_path_factory.mktemp("against") / "project")
    out = project.folder / "out.txt"
    with pytest.MonkeyPatch.context() as patch, out.open("w") as stream:
        patch.chdir(project.folder)
        patch.setattr("sys.stdout", stream)
        assert main(["init", str(int8_llama), "--reference", str(llama), "-o", "gate.qsa.yaml", *SMALL]) == 0
    return project


@pytest.fixture(scope="module")
def parts(int8_llama, llama):
    """Return −ln of both models' probabilities of every token, [parts, windows·tokens, V], by plain forwards."""
    both = [transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (int8_llama, llama)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    windows = batches_of(Data(num_samples=8, seq_len=24), tokenizer, llama)
    ids = torch.cat([window["input_ids"] for window in windows]).reshape(4, 2, 24)
    with torch.no_grad():
        tables = [[-model(part).logits.double().log_softmax(-1) for part in ids] for model in both]
    return ids, torch.stack(tables[0]), torch.stack(tables[1])


def test_a_suite_against_the_original_compares_files_weights_layers_blocks_and_predictions(against, llama):
    suite = load_suite(against.folder / "gate.qsa.yaml")
    assert [assertion.id for assertion in suite.assertions] == AGAINST
    reference = yaml.safe_load(against.read("gate.qsa.yaml"))["model"]["reference"]
    assert (against.folder / reference).resolve() == llama.resolve()
    assert set(suite.assertions[AGAINST.index("layers-alone")].min) == {
        rf"\.{kind}_proj$" for kind in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_the_floor_of_the_predictions_is_that_of_plain_forwards(against, parts):
    ids, own, theirs = parts
    assertions = {a.id: a for a in load_suite(against.folder / "gate.qsa.yaml").assertions}
    kl = (theirs.neg().exp() * (own - theirs)).sum(-1).flatten(1)
    following = ids[..., 1:, None]
    apart = (own[..., :-1, :].gather(-1, following) - theirs[..., :-1, :].gather(-1, following)).flatten(1)
    same = (own.argmin(-1) == theirs.argmin(-1)).double().flatten(1)
    for name, tokens, side, sign in (
        ("predictions-close", kl, "max", 1), ("perplexity", apart, "max", 1), ("same-words", same, "min", -1),
    ):  # fmt: skip
        noise, means = getattr(assertions[name].noise, side), tokens.mean(1)
        paired = float((tokens.std(1) / tokens.shape[1] ** 0.5).mean())
        sigma = max(float(means.std()), paired)
        assert (noise.n, noise.k) == (4, 10)
        assert noise.mean == pytest.approx(float(means.mean()), rel=2e-3)
        assert noise.sigma == pytest.approx(sigma, rel=5e-3), name
        floor = float(means.mean()) + sign * 10 * sigma
        assert sign * getattr(assertions[name], side) >= sign * floor - 2e-3 * abs(floor)


def test_the_floor_of_the_weights_is_below_the_original_rounded_to_nearest(against, llama):
    from safetensors.torch import load_file

    original = load_file(llama / "model.safetensors")
    (bound,) = (a for a in load_suite(against.folder / "gate.qsa.yaml").assertions if a.id == "weights-close")
    found = []
    for layer in range(4):
        x = original[f"model.layers.{layer}.mlp.down_proj.weight"].double()
        scale = x.abs().amax(1, keepdim=True) / 127.5
        y = (x / scale).round().clamp(-128, 127) * scale
        found.append(float(10 * torch.log10((x**2).sum() / ((x - y) ** 2).sum())))
    noise = bound.noise.min[r"\.down_proj$"]
    assert noise.mean == pytest.approx(min(found), abs=0.01)
    assert (noise.sigma, noise.room) == (0, 4)
    assert min(found) - 5 <= bound.min[r"\.down_proj$"] <= min(found) - 4


@pytest.mark.process
def test_it_holds_its_model_and_names_the_layer_of_a_fault(against, int8_llama, tmp_path):
    broken = edited(int8_llama, tmp_path / "broken", lambda weights: weights[f"{DOWN}.weight_scale"].mul_(1.05))
    both = (f"--qsa-model=sound={int8_llama}", f"--qsa-model=broken={broken}")
    run = against.pytest("gate.qsa.yaml", "--qsa-report=never", "-k", "not drift and not weight-scales", *both)
    failed = {name.partition("::")[2] for name, how in run.outcomes.items() if how == "failed"}
    named = ("weights-close", "rows-close", "groups-keep-their-size", "layers-alone")
    assert failed == {f"{name}[broken]" for name in named}, run.out
    for name in failed:
        assert f" {DOWN}" in run.first_line(f"::{name}")


def other_tokens(folder):
    """Take the merges out of a tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: save_llama(folder, layers=3), "the reference has 3 blocks (model.layers.0, …) and the model 4"),
        (lambda folder: save_llama(folder, width=64), "model.embed_tokens is 320→32 here and 320→64 in the reference"),
        (lambda folder: other_tokens(save_llama(folder)), "the reference's tokenizer makes other tokens of the data"),
    ],
)  # fmt: skip
def test_a_reference_that_is_not_the_original_is_refused_in_one_line(
    int8_llama, tmp_path, monkeypatch, capsys, make, told
):
    make(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["init", str(int8_llama), "--reference", "other", "-o", "gate.qsa.yaml", *SMALL]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("qsa: ") == error.count("\n") == 1
    assert not (tmp_path / "gate.qsa.yaml").exists()


@pytest.mark.parametrize(
    ("compare", "kinds"),
    [
        (
            "layers",
            {
                "weight_sqnr",
                "weight_gain",
                "local_sqnr",
                "sqnr",
                "new_outliers",
                "kl_divergence",
                "same_top",
                "margin_ratio",
                "flips",
                "ln_ppl_ratio",
            },
        ),
        ("blocks", {"sqnr", "new_outliers", "kl_divergence", "same_top", "margin_ratio", "flips", "ln_ppl_ratio"}),
        ("logits", {"kl_divergence", "same_top", "margin_ratio", "flips", "ln_ppl_ratio"}),
    ],
)
def test_smoothed_models_are_compared_by_blocks_and_rotated_ones_by_predictions(compare, kinds):
    anatomy = Anatomy(["model.layers.0", "model.layers.1"], ["model.layers.0.mlp.down_proj"])
    alone = {draft.keys["metric"] for draft in measured_drafts(anatomy)}
    assert {draft.keys["metric"] for draft in measured_drafts(anatomy, compare)} - alone == kinds


def test_answers_as_data_get_assertions_on_where_they_end():
    anatomy = Anatomy(["model.layers.0"], ["model.layers.0.mlp.down_proj"])
    of_text, of_answers = (
        {draft.keys["id"]: draft.open for draft in measured_drafts(anatomy, "layers", answers=answers)}
        for answers in (False, True)
    )
    ends = {"boundaries-kept": ["min"], "boundaries-as-likely": ["max"], "no-other-boundaries": ["max"]}
    assert of_answers == {**of_text, **ends}


@pytest.mark.parametrize(
    ("schemes", "few"),
    [({"a": "w8a8_int"}, False), ({"a": "none", "b": "w4a16_int"}, True), ({"a": "w16a16"}, False), (None, False)],
)
def test_the_drift_of_a_model_in_few_bits_is_of_its_blocks_and_has_the_room_of_another_rounding(schemes, few):
    anatomy = Anatomy(["model.layers.0", "model.layers.1"], ["model.layers.0.mlp.down_proj"])
    given = measured_drafts(anatomy)
    drafts = {draft.keys["id"]: with_tolerance(draft, schemes, anatomy.block_pattern).keys for draft in given}
    assert drafts["drift"]["baseline"] == {"rel": 0.3 if few else 0.1}
    assert drafts["drift"]["layers"] == (anatomy.block_pattern if few else "kind:linears")
    assert drafts["weight-scales"]["baseline"] == {"rel": 0.02}


def test_a_suite_of_a_smoothed_model_says_so(int8_llama, llama, tmp_path, monkeypatch, capsys):
    def smooth(weights):
        """Undo a smoothing of the int8 model, in the original: a norm gives more, and the columns take it back."""
        block, gain = "model.layers.1", torch.linspace(1.2, 3.0, 32)
        weights[f"{block}.input_layernorm.weight"] *= gain
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{block}.self_attn.{name}.weight"] /= gain

    edited(llama, tmp_path / "other", smooth)
    monkeypatch.chdir(tmp_path)
    few = ("--parts", "2", "--passes", "1")
    assert main(["init", str(int8_llama), "--reference", "other", "-o", "gate.qsa.yaml", *SMALL, *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("make up for it: whole blocks are compared, not layers") for line in lines)
    left = next(line for line in lines if line.startswith("left out: unquantized"))
    assert "model.layers.1.input_layernorm.weight" in left
    ids = [assertion.id for assertion in load_suite(tmp_path / "gate.qsa.yaml").assertions]
    # sizes of layers follow the factors that a calibration folds in
    assert not {"unquantized", "layers-alone", "weights-close", "weight-scales"} & set(ids)
    drift = next(each for each in load_suite(tmp_path / "gate.qsa.yaml").assertions if each.id == "drift")
    assert drift.layers == "kind:blocks"
    assert "blocks-close" in ids


TEMPLATE = "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}> {% endif %}"


def test_a_chat_model_gets_assertions_on_its_answers_with_room_for_chance(
    tmp_path, monkeypatch, capsys, int8_llama, llama
):
    for name, folder in (("own", int8_llama), ("original", llama)):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.chdir(tmp_path)
    size = ["--generation.num_prompts", "9", "--generation.max_new_tokens", "12"]
    words = ["init", "own", "--reference", "original", *SMALL, *size]
    assert main([*words, "-o", "g.qsa.yaml"]) == 0
    suite = load_suite(tmp_path / "g.qsa.yaml")
    assert suite.suite.generation.num_prompts == 9
    (loops,) = (each for each in suite.assertions if each.id == "answers-without-loops")
    noise = loops.noise.max
    assert (loops.tier, noise.over, noise.n, noise.k) == ("nightly", "prompts", 9, 3)
    assert loops.max >= 3 * noise.sigma
    assert noise.sigma == pytest.approx(1 / 9, abs=1e-3)
    assert (
        "left out: answers-end: of 9 prompts none has an answer of the reference that ends" in capsys.readouterr().out
    )
    assert main([*words, "-o", "less.qsa.yaml", "--no-answers"]) == 0
    assert "metric: generation" not in (tmp_path / "less.qsa.yaml").read_text()
