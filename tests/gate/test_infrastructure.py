"""What CI needs: no token text, no secret, no update by itself, pinned revisions, one more try of a broken download."""

from __future__ import annotations

import shutil

import pytest

from pytest_qsa.common.errors import InfraError, scrubbed
from pytest_qsa.engine.load import models as loading
from pytest_qsa.suite import Memory, Model
from support.projects import Project, peaks, suite

DRIFT = "id: drift, metric: rms, layers: down_proj$, site: output, baseline: {rel: 0.05}"
OUTLIERS = r"id: outliers, metric: outlier_tokens, layers: 'layers\.\d$', site: output, threshold: 1, max: 0"
CI = {"CI": "true"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def gated(own_project, llama):
    """Return a project with a suite that has a baseline."""
    own_project.write("a.qsa.yaml", suite(llama, DRIFT))
    return own_project


@pytest.mark.process
def test_under_ci_an_update_of_baselines_is_refused(gated):
    run = gated.pytest("--snapshot-update", "--qsa-report=never", environment=CI)
    assert run.code == 4
    assert "--snapshot-update under CI" in run.out
    assert "Traceback" not in run.out
    assert not (gated.folder / "qsa_baselines").exists()


@pytest.mark.process
def test_workers_refuse_an_update_under_ci_as_well(gated):
    run = gated.pytest("--snapshot-update", "--qsa-report=never", "-n", "1", environment=CI)
    assert run.code == 1
    assert run.first_line("::drift").startswith("INFRA drift: --snapshot-update under CI")
    assert not (gated.folder / "qsa_baselines").exists()


@pytest.mark.process
def test_an_update_under_ci_can_be_allowed(gated):
    run = gated.pytest("--snapshot-update", "--qsa-allow-update", "--qsa-report=never", environment=CI)
    assert run.code == 0, run.out
    assert (gated.folder / "qsa_baselines/llama/a/drift.json").exists()


@pytest.mark.process
@pytest.mark.parametrize("value", ["", "0", "false"])
def test_a_ci_that_says_no_is_none(gated, value):
    assert gated.pytest("--snapshot-update", "--qsa-report=never", environment={"CI": value}).code == 0


@pytest.mark.process
def test_snapshots_of_others_may_be_updated_under_ci(own_project):
    own_project.write("test_words.py", "def test_words(snapshot): assert [1] == snapshot\n")
    assert own_project.pytest("--snapshot-update", environment=CI).code == 0


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, llama):
    """Run a failure that shows tokens, with and without their text; return the terminal's and the page's text."""
    found = {}
    for name, options in (("shown", ()), ("redacted", ("--qsa-redact",)), ("ini", ("-o", "qsa_redact=true"))):
        project = Project(tmp_path_factory.mktemp("redact") / name)
        project.write("a.qsa.yaml", suite(llama, OUTLIERS))
        run = project.pytest(*options)
        assert run.code == 1
        found[name] = run.out, project.json("qsa-results/report.json")["results"][0], project
    return found


@pytest.mark.process
def test_a_redacted_run_shows_no_token_anywhere(outputs):
    shown = outputs["shown"][1]["evidence"][0]
    words = [shown[key] for key in ("before", "text", "after")]
    assert all(words)
    for name in ("redacted", "ini"):
        out, result, project = outputs[name]
        tokens = result["evidence"]
        assert tokens
        assert {(token["text"], token["before"], token["after"]) for token in tokens} == {("", "", "")}
        assert "(no text kept)" in out
        page = project.read("qsa-results/report.html")
        assert "⟨" not in out.replace("⟦", "")
        assert max(words, key=len) not in page
        assert max(words, key=len) in outputs["shown"][2].read("qsa-results/report.html")


@pytest.mark.process
def test_a_redacted_run_keeps_the_numbers(outputs):
    def numbers(result):
        return [(token["layer"], token["sample"], token["position"], token["ratio"]) for token in result["evidence"]]

    assert numbers(outputs["redacted"][1]) == numbers(outputs["shown"][1])
    assert outputs["redacted"][1]["artefacts"].keys() == outputs["shown"][1]["artefacts"].keys()


def test_the_token_of_the_hub_is_in_no_error(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    text = "401 for https://user:pass@host/x?a=s3cret with Bearer abc.def and hf_abcdefghijklmnop"
    assert str(InfraError(text)) == "401 for https://…@host/x?a=… with Bearer … and …"
    assert scrubbed("nothing of hf_ or @ here") == "nothing of hf_ or @ here"


@pytest.mark.process
def test_the_token_of_the_hub_is_in_no_output(own_project):
    own_project.write("a.qsa.yaml", suite("./nowhere-s3cret-token", peaks("max: 1")))
    run = own_project.pytest("--qsa-report=always", environment={"HF_TOKEN": "s3cret-token"})
    assert run.first_line("::peaks").startswith("INFRA peaks: there is no folder ./nowhere-…")


@pytest.mark.process
def test_a_hub_id_without_a_revision_is_a_warning_that_names_the_commit(own_project, llama):
    cache = own_project.folder / "hub" / "models--org--tiny"
    shutil.copytree(llama, cache / "snapshots" / COMMIT)
    own_project.write("hub/models--org--tiny/refs/main", COMMIT)
    own_project.write("a.qsa.yaml", suite("org/tiny", DRIFT))
    own_project.write(
        "conftest.py",
        "import huggingface_hub.constants\n"
        f"huggingface_hub.constants.HF_HUB_CACHE = {str(own_project.folder / 'hub')!r}\n",
    )
    run = own_project.pytest("--snapshot-update", "--qsa-report=never")
    assert run.code == 0, run.out
    texts = [warning["text"] for warning in run.warnings]
    assert texts == [f"org/tiny may be other weights tomorrow: pin what ran with model.revision: {COMMIT}"]
    made_with = own_project.json("qsa_baselines/llama/a/drift.json")["made_with"]
    assert made_with["weights"].startswith("sha256:")


class Answer:
    def __init__(self, status_code):
        self.status_code = status_code


def refused(status):
    error = OSError(f"HTTP {status}")
    error.response = Answer(status)
    return error


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (ConnectionResetError("reset"), 2),
        (TimeoutError("slow"), 2),
        (refused(503), 2),
        (refused(401), 1),
        (refused(404), 1),
        (OSError("no such file"), 1),
        (MemoryError("full"), 1),
    ],
    ids=lambda value: str(value),
)
def test_what_a_second_try_can_help_is_tried_once_more(monkeypatch, error, tries):
    calls = []

    def load(*arguments):
        calls.append(arguments)
        raise OSError("wrapped") from error

    monkeypatch.setattr(loading.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(loading, "_from_checkpoint", load)
    with pytest.raises(InfraError, match="wrapped"):
        loading.load_model(Model(path="org/x"), "org/x", Memory(), allow_code=False)
    assert len(calls) == tries


def test_a_second_try_that_works_is_a_load(monkeypatch):
    answers = iter([ConnectionResetError("reset"), "loaded"])

    def attempt():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert loading.once_more(attempt, pause=0) == "loaded"
