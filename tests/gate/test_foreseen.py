"""A pattern, a group or a site that a model hasn't is found before its weights are hashed or read; other tests run."""

from __future__ import annotations

import pytest

from pytest_qsa.captures import LayerNames, Outline
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.engine import load_model, look_ahead, outline_of
from pytest_qsa.suite import Captures, Data, Memory, Model, NamedSubject, OneTestError
from pytest_qsa.suite.fingerprint import FileHashes
from pytest_qsa.verdicts import foresee
from support.checkpoints import edited, save_gguf, save_gpt_oss, save_llama
from support.judged import assertion_of
from support.projects import COUNTED, Project, peaks, suite

TYPO = r"layers\.\d\.mpl$"
BLOCKS = ("layers.0", "layers.1")
OUTLINE = Outline(
    LayerNames([*BLOCKS, "layers.0.mlp", "layers.0.act", "layers.0.experts", "layers.0.experts.0.up_proj"],
               frozenset({"layers.0.experts.0.up_proj"})),
    bare=frozenset({*BLOCKS, "layers.0.act"}), blocks=BLOCKS, mixtures=frozenset({"layers.0.experts"}),
    of_ids=frozenset({"layers.0.mlp"}),
)  # fmt: skip
FORESEEN = {
    "no layer matches": {"metric": "absmax", "layers": "mpl$", "site": "output", "max": 1},
    r"exclude 'layers' leaves none": {
        "metric": "absmax", "layers": "mlp$", "exclude": "layers", "site": "output", "max": 1},
    r"none of the 2 layers that '\\d\$' matches owns a weight": {
        "metric": "absmax", "layers": r"\d$", "site": "weight", "max": 1},
    r"the group 'layers\\.9\$' of max matches none of the 2 layers": {
        "metric": "absmax", "layers": r"\d$", "site": "output", "max": {r"layers\.9$": 1, "default": 2}},
    r"layers.1 is in no group of min": {"metric": "rms", "layers": r"\d$", "site": "input", "min": {r"\.0$": 1}},
    r"no experts that tokens are routed to": {
        "metric": "expert_tokens", "layers": "act$", "site": "input", "min": 1},
    r"the hook at layers\.0\.mlp never fired": {"metric": "absmax", "layers": "mlp$", "site": "input", "max": 1},
    r"no layer matches '0\\.up_proj'": {"metric": "rms", "layers": r"0\.up_proj", "site": "output", "max": 1},
}  # fmt: skip
SOUND = [
    {"metric": "absmax", "layers": r"\d$", "site": "output", "max": {r"\.0$": 1, "scheme:w8a8": 2}},
    {"metric": "absmax", "layers": ".", "site": "weight", "max": {"mlp": 1}},
    {"metric": "expert_tokens", "layers": "experts$", "site": "input", "min": 1},
    {"metric": "kl_divergence", "stat": "mean", "max": 1},
    {"metric": "sqnr", "layers": r"\d$", "site": "output", "min": {r"\.0$": 1, "default": 2}},
]


@pytest.mark.parametrize("text", FORESEEN)
def test_what_a_model_has_not_is_said_as_after_a_pass(text):
    with pytest.raises(AnomalyError, match=text):
        foresee(assertion_of(**FORESEEN[text]), OUTLINE)


@pytest.mark.parametrize("keys", SOUND, ids=lambda keys: keys["metric"])
def test_what_names_alone_do_not_contradict_is_left_to_the_pass(keys):
    foresee(assertion_of(**keys), OUTLINE)


def test_sinks_are_looked_for_only_in_a_model_with_blocks():
    asked = assertion_of(metric="outlier_tokens", layers="mlp$", site="output", positions="no_sink", max=1)
    foresee(asked, OUTLINE)
    with pytest.raises(AnomalyError, match="in a model without a list of blocks"):
        foresee(asked, Outline(OUTLINE.names, blocks=()))


def test_a_model_without_a_head_predicts_nothing():
    with pytest.raises(AnomalyError, match="LlamaModel returns no logits"):
        foresee(assertion_of(metric="kl_divergence", stat="mean", max=1), Outline(OUTLINE.names, headless="LlamaModel"))


def subject_at(folder, *, data=Data(), **model):  # noqa: B008 - it is frozen
    return NamedSubject("m", Model(path=str(folder), **model), data, Memory(device="cpu"), folder)


@pytest.mark.parametrize("form", ["float", "int8", "int4", "torchao int4", "gguf", "experts"])
def test_the_layers_are_known_without_weights_by_the_names_that_they_have_when_loaded(quantized, tmp_path, form):
    folder, more = quantized["float"], {}
    if form == "gguf":
        folder = save_gguf(tmp_path / "gguf", folder)
        more = {"gguf_file": next(folder.glob("*.gguf")).name}
    elif form == "experts":
        folder = save_gpt_oss(tmp_path / "experts")
    else:
        folder = quantized[form]
    subject = subject_at(folder, **more)
    loaded = load_model(subject.model, subject.path, subject.memory, allow_code=False)
    own = outline_of(loaded.model)
    for as_loaded in (False, True):
        found = look_ahead(subject, [], as_loaded=as_loaded)
        assert (found.names, found.blocks) == (own.names, own.blocks)
        assert found.bare <= own.bare
        assert (found.of_ids, found.headless) == ({"model.embed_tokens"}, "")


def test_what_would_stop_loading_is_said_before_a_weight_is_read(int8_llama, tmp_path):
    with pytest.raises(InfraError, match=r"model\.trust_remote_code runs code"):
        look_ahead(subject_at(int8_llama, trust_remote_code=True), [])
    with pytest.raises(InfraError, match="there is no folder"):
        look_ahead(subject_at(tmp_path / "absent"), [])
    with pytest.raises(InfraError, match=r"absent\.txt"):
        look_ahead(subject_at(int8_llama, data=Data(source="custom:absent.txt")), [])
    with pytest.raises(InfraError, match=r"did you mean 'sample'"):
        look_ahead(subject_at(int8_llama, data=Data(source="sampel")), [])
    with pytest.raises(InfraError, match=r"10,?000,?000"):
        look_ahead(subject_at(int8_llama, data=Data(seq_len=10_000_000)), [])
    cut = edited(int8_llama, tmp_path / "cut")
    weights = next(cut.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AnomalyError, match="safetensors"):
        look_ahead(subject_at(cut), [])


def test_a_test_that_can_not_be_judged_neither_hashes_nor_fails_the_others(llama, tmp_path, monkeypatch):
    hashed, passes = [], []
    monkeypatch.setattr(FileHashes, "of", lambda self, file: hashed.append(file) or "00")
    monkeypatch.setattr("pytest_qsa.suite.fingerprint.SMALL", 100)
    captures, subject = Captures(cache=tmp_path / "cache"), subject_at(llama)

    def stop():
        raise OneTestError("no layer")

    with pytest.raises(OneTestError):
        captures.get("key", subject, [], lambda plan, sums: passes.append(plan), look_ahead=stop)
    assert (hashed, passes) == ([], [])
    with pytest.raises(AttributeError):  # it is made: what is returned here is none
        captures.get("key", subject, [], lambda plan, sums: passes.append(plan))
    assert len(passes) == 1
    assert hashed


@pytest.fixture(scope="module")
def typos(tmp_path_factory, llama):
    """Run a suite of which two assertions ask for what the model hasn't, and plan it."""
    project = Project(tmp_path_factory.mktemp("typos") / "project")
    group = r"max: {'layers\.9$': 1, default: 100}"
    project.write("a.qsa.yaml", suite(llama, peaks("max: 100"), peaks("max: 1", "typo", TYPO), peaks(group, "group")))
    project.run = project.pytest("a.qsa.yaml", "--qsa-report=never")
    project.plan = project.pytest("a.qsa.yaml", "--qsa-plan")
    return project


@pytest.mark.process
def test_a_typo_fails_its_own_test_and_is_told_before_the_others_have_run(typos):
    run = typos.run
    assert run.outcomes == {"a.qsa.yaml::peaks": "passed", "a.qsa.yaml::typo": "failed", "a.qsa.yaml::group": "failed"}
    assert run.kind("::typo") == run.kind("::group") == "ANOMALOUS"
    told = [line for line in run.out.partition("= FAILURES")[0].splitlines() if line.startswith("qsa: ")]
    assert [line.partition(":")[2].strip()[:40] for line in told] == [
        r"a.qsa.yaml::typo fails: no layer matches"[:40], "a.qsa.yaml::group fails: the group 'laye"[:40]]  # fmt: skip


@pytest.mark.process
def test_a_plan_fails_where_a_test_would_whatever_is_measured(typos):
    assert typos.plan.code == 1
    lines = [line.split()[1] for line in typos.plan.out.splitlines() if line.startswith("fails ")]
    assert lines == ["a.qsa.yaml::typo:", "a.qsa.yaml::group:"]


@pytest.mark.process
def test_the_layers_of_a_factory_are_checked_once_it_has_loaded_and_before_a_forward(own_project, llama):
    own_project.write("counted.py", COUNTED.format(path=str(llama)))
    text = suite("x", peaks("max: 1", "typo", TYPO), peaks("max: 1", "other", "nowhere"))
    own_project.write("a.qsa.yaml", text.replace("path: x", "factory: counted:make"))
    run = own_project.pytest("a.qsa.yaml", "--qsa-report=never", "--qsa-allow-code")
    assert own_project.read("notes.txt").split() == ["load"]
    assert "no layer matches 'nowhere'" in run.first_line("::other")
    assert "no layer matches" in run.first_line("::typo")


@pytest.mark.process
def test_a_test_in_python_with_marks_for_several_models_runs_if_one_fits(own_project, llama):
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 100")))
    mark = "@pytest.mark.qsa(layers=r'{}', site='output', metric='absmax')\n"
    test = "def test_{}(qsa): assert qsa.output(r'layers\\.\\d$').absmax() <= 100\n\n\n"
    fits = mark.format("nowhere") + mark.format(r"layers\.\d$") + test.format("fits")
    own_project.write("test_p.py", "import pytest\n\n\n" + fits + mark.format("nowhere") + test.format("typo"))
    run = own_project.pytest("--qsa-config=a.qsa.yaml", "--qsa-report=never", "test_p.py")
    assert run.outcomes == {"test_p.py::test_fits": "passed", "test_p.py::test_typo": "failed"}
    assert "no layer matches 'nowhere'" in run.first_line("::test_typo")


@pytest.mark.process
def test_a_pattern_that_one_of_two_models_lacks_fails_for_that_one(own_project, llama, tmp_path):
    short = save_llama(tmp_path / "short", layers=2)
    own_project.write("a.qsa.yaml", suite(llama, peaks("max: 100"), peaks("max: 100", "deep", r"layers\.3$")))
    models = (f"--qsa-model=long={llama}", f"--qsa-model=short={short}")
    run = own_project.pytest("a.qsa.yaml", "--qsa-report=never", *models)
    outcomes = {nodeid.partition("::")[2]: outcome for nodeid, outcome in run.outcomes.items()}
    assert outcomes == {
        "peaks[long]": "passed",
        "deep[long]": "passed",
        "peaks[short]": "passed",
        "deep[short]": "failed",
    }
    assert "no layer matches" in run.first_line("::deep[short]")
