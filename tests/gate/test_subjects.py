"""The model under test: loaded once, run once, for whatever asks; and what is said of one that can't be."""

from __future__ import annotations

import shutil

import pytest

from support.checkpoints import save_llama
from support.projects import COUNTED, Project, peaks, suite

pytestmark = pytest.mark.process


def factory_suite(function, *assertions):
    return suite("x", *assertions).replace("path: x", f"factory: counted:{function}")


@pytest.fixture(scope="module")
def counted(tmp_path_factory, llama):
    """Return a project whose model notes each load and each forward."""
    project = Project(tmp_path_factory.mktemp("counted") / "project")
    project.write("counted.py", COUNTED.format(path=str(llama)))
    project.write("a.qsa.yaml", factory_suite("make", peaks("max: 100"), peaks("max: 100", "o", r"mlp$")))
    project.write("b.qsa.yaml", factory_suite("make", peaks("max: 100", site="input"), peaks("max: 0", "low")))
    project.write("broken.qsa.yaml", factory_suite("fail", peaks("max: 1"), peaks("max: 2", "again")))
    project.write(
        "test_python.py",
        r"""
        import json
        from pathlib import Path
        import pytest

        @pytest.mark.qsa(layers=r"q_proj$", site="output")
        def test_marked(qsa):
            assert qsa.output(r"q_proj$").absmax() <= 100

        @pytest.mark.qsa(layers=r"v_proj$", site="output")
        def test_sites(qsa):
            Path(__file__).with_name("sites.json").write_text(json.dumps(sorted(map(list, qsa.capture.sites))))
        """,
    )

    def run(*arguments):
        (project.folder / "notes.txt").unlink(missing_ok=True)
        done = project.pytest("--qsa-config=a.qsa.yaml", "--qsa-report=never", *arguments)
        notes = project.folder / "notes.txt"
        return done, notes.read_text().split() if notes.exists() else []

    project.counting = run
    return project


@pytest.fixture(scope="module")
def all_of_them(counted):
    return counted.counting("--qsa-allow-code", "a.qsa.yaml", "b.qsa.yaml", "test_python.py")


def test_one_load_and_one_forward_a_sample_serve_all_suites_and_python_tests(all_of_them):
    run, notes = all_of_them
    assert len(run.reports) == 6
    assert list(run.outcomes.values()).count("passed") == 5
    assert notes == ["load", "forward", "forward"]


def test_only_what_the_selected_tests_need_is_measured(counted, all_of_them):
    everywhere = {tuple(site) for site in counted.json("sites.json")}
    counted.counting("--qsa-allow-code", "-k", "test_sites or o", "a.qsa.yaml", "test_python.py::test_sites")
    selected = {tuple(site) for site in counted.json("sites.json")}
    assert selected < everywhere
    assert ("model.layers.0.self_attn.q_proj", "output") in everywhere
    layers = {name.rpartition(".")[2] for name, _ in selected if not name.rpartition(".")[2].isdigit()}
    assert layers == {"v_proj", "mlp"}


def test_a_factory_is_refused_unless_the_operator_allows_it(counted):
    run, notes = counted.counting("a.qsa.yaml")
    assert not notes
    assert set(run.outcomes.values()) == {"failed"}
    assert run.kind("a.qsa.yaml::peaks") == "INFRA"
    assert "--qsa-allow-code" in run.first_line("a.qsa.yaml::peaks")


def test_code_can_be_allowed_in_the_ini_file(counted):
    run, notes = counted.counting("-o", "qsa_allow_code=true", "a.qsa.yaml::peaks")
    assert (run.code, notes) == (0, ["load", "forward", "forward"])


def test_a_failure_to_load_is_met_once_and_told_by_the_first_test(counted):
    run, notes = counted.counting("--qsa-allow-code", "broken.qsa.yaml")
    assert notes == ["load"]
    said = [run.first_line(f"::{name}").removeprefix(f"INFRA {name}: ") for name in ("peaks", "again")]
    assert said[0].endswith("RuntimeError: no such thing")
    assert said[1].endswith("broken.qsa.yaml::peaks has the reason")
    assert "Traceback" not in run.out
    assert ".py:" not in run.text("::peaks")


BROKEN = {
    "nowhere": ("./nowhere", "", "nowhere"),
    "folder": ("empty", "", "empty"),
    "lacking": (
        "lacking", "", "model.layers.1.mlp.down_proj.weight, model.layers.3.input_layernorm.weight",
    ),
    "dropping": (
        "dropping", "", "model.layers.1.mlp.down_proj.scale_of_weight",
    ),
    "tokens": ("bare", "", "has no tokenizer"),
    "pointer": ("pointer", "", "git lfs pull"),
    "little": ("bare", "source: 'custom:little.txt'", "'custom:little.txt'"),
    "absent": ("bare", "source: 'custom:absent.txt'", "texts/absent.txt"),
    "column": ("bare", "source: 'custom:rows.jsonl'", "rows.jsonl"),
    "source": ("bare", "source: wikipedia", "'wikipedia'"),
    "remote": ("bare, trust_remote_code: true", "", "allow it with --qsa-allow-code"),
    "part": ("bare, submodule: thinker", "", "'thinker'"),
    "device": ("bare", "", "cuda:77"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Run a suite over each subject that can't be run."""
    project = Project(tmp_path_factory.mktemp("broken") / "project")
    folder = project.folder / "texts"

    def lose(weights):
        del weights["model.layers.1.mlp.down_proj.weight"], weights["model.layers.3.input_layernorm.weight"]

    def rename(weights):
        weights["model.layers.1.mlp.down_proj.scale_of_weight"] = weights["model.norm.weight"].clone()

    save_llama(folder / "lacking", lose)
    save_llama(folder / "dropping", rename)
    save_llama(folder / "bare", tokenizer=False)
    save_llama(folder / "pointer")
    project.write("texts/pointer/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    project.write("texts/empty/README", "")
    project.write("texts/little.txt", "too little")
    project.write("texts/rows.jsonl", '{"prompt": "x"}\n')
    for name, (path, source, _) in BROKEN.items():
        text = suite(path, peaks("max: 1"), sections="memory: {device: cuda:77}\n" if name == "device" else "")
        path = f"texts/{name}.qsa.yaml"
        project.write(path, text.replace("seq_len: 32", f"seq_len: 32, {source}") if source else text)
        if name in ("little", "absent", "column", "source"):
            project.write(path, project.read(path).replace("path: bare", "path: whole"))
    save_llama(folder / "whole")
    return project.pytest("--qsa-report=never")


@pytest.mark.parametrize("name", BROKEN)
def test_a_subject_that_cannot_be_run_is_told_in_one_line(broken, name):
    test = f"{name}.qsa.yaml::peaks"
    assert broken.outcomes[f"texts/{test}"] == "failed"
    of_files = name in ("folder", "lacking", "dropping", "tokens")
    assert broken.first_line(test).startswith(f"{'ANOMALOUS' if of_files else 'INFRA'} peaks: ")
    assert BROKEN[name][2] in broken.first_line(test)
    assert "Traceback" not in broken.text(test)
    assert ".py:" not in broken.text(test)
    assert "ImportError" not in broken.text(test)


def test_a_path_that_is_no_folder_is_not_called_a_malformed_repository(broken):
    assert "epo id" not in broken.first_line("nowhere.qsa.yaml::peaks")


def test_custom_data_lies_beside_the_suite(own_project, llama):
    own_project.write("deep/words.txt", "one two three four five six seven " * 40)
    text = suite(llama, peaks("max: 100")).replace("seq_len: 32", "seq_len: 32, source: 'custom:words.txt'")
    own_project.write("deep/a.qsa.yaml", text)
    assert own_project.pytest().code == 0
    assert own_project.pytest("a.qsa.yaml", cwd="deep").code == 0


FIXTURES = {
    "mlp": """
        import pytest
        from torch import nn
        import torch

        @pytest.fixture(scope="session")
        def qsa_model():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        @pytest.fixture(scope="session")
        def qsa_batches():
            return [{"input": torch.full((3, 4), float(n))} for n in (1, 2)]

        @pytest.mark.qsa(layers=".", site="input")
        def test_inputs_are_ours(qsa):
            assert qsa.input("^0$").absmax() == 2

        @pytest.mark.qsa(layers=".", site="output")
        def test_tokens_need_a_token_axis(qsa):
            assert qsa.output("^2$").outlier_tokens() <= 1

        def test_weights(qsa):
            series = qsa.weight(".").absmax()
            assert series.layers == ["0", "2"]
            assert series <= 1
        """,
    "conv": """
        import pytest
        from torch import nn
        import torch

        @pytest.fixture(scope="session")
        def qsa_model():
            return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))

        @pytest.fixture(scope="session")
        def qsa_batches():
            return [{"input": torch.full((1, 3, 8, 8), 7.0)}]

        @pytest.mark.qsa(layers=".", site="input")
        def test_inputs_are_ours(qsa):
            assert qsa.input("^0$").absmax() == 7
        """,
    "encoder": """
        import pytest
        import torch
        from transformers import BertConfig, BertModel

        @pytest.fixture(scope="session")
        def qsa_model():
            torch.manual_seed(0)
            config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=32)
            return BertModel(config)

        @pytest.fixture(scope="session")
        def qsa_batches():
            return [torch.arange(24).reshape(2, 12)]

        @pytest.mark.qsa(layers=r"layer.\\d$", site="output")
        def test_blocks(qsa):
            series = qsa.output(r"layer.\\d$").outlier_tokens()
            assert series.layers == ["encoder.layer.0", "encoder.layer.1"]
            assert series <= 0
        """,
    "each": """
        import pytest
        from torch import nn
        import torch

        @pytest.fixture(scope="session", params=[1.0, 5.0])
        def qsa_model(request):
            model = nn.Sequential(nn.Linear(4, 4))
            nn.init.constant_(model[0].weight, request.param)
            model.expected = request.param
            return model

        @pytest.fixture(scope="session")
        def qsa_batches():
            return [{"input": torch.ones(1, 4)}]

        def test_weights_are_ours(qsa, qsa_model):
            assert qsa.weight("0").absmax() == qsa_model.expected
        """,
    "wrong": """
        import pytest

        @pytest.fixture(scope="session")
        def qsa_model():
            return "a model"

        def test_it(qsa):
            assert qsa.output("x").absmax() <= 1
        """,
}


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory, llama):
    """Run tests whose models come from fixtures of their own, and a suite without a model."""
    project = Project(tmp_path_factory.mktemp("fixtures") / "project")
    for name, text in FIXTURES.items():
        project.write(f"test_{name}.py", text)
    project.write("none/test_none.py", "def test_it(qsa):\n    assert qsa.output('x').absmax() <= 1\n")
    project.write(
        "suite/conftest.py",
        f"""
        import pytest

        @pytest.fixture(scope="session")
        def qsa_model():
            from transformers import AutoTokenizer, LlamaForCausalLM
            return LlamaForCausalLM.from_pretrained({str(llama)!r}), AutoTokenizer.from_pretrained({str(llama)!r})
        """,
    )
    text = suite("x", peaks("max: 100"))
    project.write("suite/a.qsa.yaml", "\n".join(text.splitlines()[1:]))
    return project.pytest("--qsa-report=never", "-W", "default::pytest_qsa.common.errors.QsaUnplannedCaptureWarning")


@pytest.mark.parametrize(
    "test",
    [
        "test_mlp.py::test_inputs_are_ours",
        "test_mlp.py::test_weights",
        "test_conv.py::test_inputs_are_ours",
        "test_encoder.py::test_blocks",
        "test_each.py::test_weights_are_ours[1.0]",
        "test_each.py::test_weights_are_ours[5.0]",
        "suite/a.qsa.yaml::peaks",
    ],
)
def test_a_fixture_gives_the_model_of_its_own_tests(fixtures, test):
    assert fixtures.outcomes[test] == "passed", fixtures.text(test)


def test_a_metric_of_tokens_says_that_features_have_none(fixtures):
    assert fixtures.first_line("::test_tokens_need_a_token_axis").startswith(
        "ANOMALOUS test_tokens_need_a_token_axis: outlier_tokens needs a token axis, which the output of 2"
    )


def test_a_fixture_that_returns_no_module_is_told(fixtures):
    assert fixtures.first_line("test_wrong.py::test_it") == (
        "INFRA test_it: the fixture qsa_model returned str, not a torch.nn.Module"
    )


def test_a_python_test_without_a_subject_says_how_to_give_one(fixtures):
    line = fixtures.first_line("test_none.py::test_it")
    assert line.startswith("INFRA test_it: ")
    assert all(way in line for way in ("--qsa-config", "--qsa-model", "qsa_model"))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, llama, changed_llama):
    """Make a project with a baseline and run it over two checkpoints, in the ways that one may."""
    project = Project(tmp_path_factory.mktemp("matrix") / "project")
    (project.folder / "ckpt").mkdir()
    (project.folder / "ckpt/old").symlink_to(llama)
    (project.folder / "ckpt/new").symlink_to(changed_llama)
    drift = "id: drift, metric: magnitude, stat: median, layers: down_proj$, site: output, baseline: {rel: 0.05}"
    project.write("s/a.qsa.yaml", suite("../ckpt/old", drift))
    project.write(
        "s/test_p.py",
        """
        import pytest

        @pytest.mark.parametrize("site", ["input", "output"])
        @pytest.mark.qsa(layers="down_proj$", site="input")
        @pytest.mark.qsa(layers="down_proj$", site="output")
        def test_drift(qsa, qsa_baseline, site):
            assert getattr(qsa, site)("down_proj$").rms() == qsa_baseline(rel=0.05)
        """,
    )
    project.runs = {"made": project.pytest("--qsa-report=never", "--snapshot-update", "--qsa-config=s/a.qsa.yaml")}
    project.made = project.files("s/qsa_baselines")
    options = ["--qsa-report=never", "--qsa-config=s/a.qsa.yaml"]
    project.runs["one"] = project.pytest(*options, "--qsa-model=ckpt/new")
    project.runs["below"] = project.pytest(*options[:1], "--qsa-model=../ckpt/new", "a.qsa.yaml", cwd="s")
    project.runs["two"] = project.pytest(*options, "--qsa-model=ckpt/new", "--qsa-model=ckpt/old")
    two = ["--qsa-model=first=ckpt/new", "--qsa-model=second=ckpt/old"]
    project.after_two = project.files("s/qsa_baselines")
    project.runs["update"] = project.pytest(*options, *two, "--snapshot-update")
    project.runs["named"] = project.pytest(*options, *two)
    return project


TESTS = ["a.qsa.yaml::drift", "test_p.py::test_drift[input]", "test_p.py::test_drift[output]"]


def test_one_checkpoint_keeps_the_ids_clean(matrix):
    assert matrix.runs["one"].collected == [f"s/{test}" for test in TESTS]


def test_a_new_checkpoint_meets_the_baselines_of_the_suites_own_model(matrix):
    for test in (TESTS[0], TESTS[2]):
        assert matrix.runs["one"].first_line(test).startswith("REGRESSION ")
        assert "model.layers.2.mlp.down_proj" in matrix.runs["one"].text(test)
    assert matrix.runs["below"].first_line("a.qsa.yaml::drift").startswith("REGRESSION drift: ")


def test_the_failure_says_which_checkpoint_ran(matrix):
    assert "new" in matrix.runs["one"].labelled("a.qsa.yaml::drift")["ran"][0]


def test_two_checkpoints_without_names_are_both_held_against_the_suites_model(matrix):
    outcomes = matrix.runs["two"].outcomes
    assert outcomes["s/a.qsa.yaml::drift[new]"] == "failed"
    assert outcomes["s/a.qsa.yaml::drift[old]"] == "passed"
    assert {outcome for test, outcome in outcomes.items() if "old" in test} == {"passed"}


def test_comparing_without_update_writes_nothing(matrix):
    assert matrix.made == matrix.after_two


def test_a_named_checkpoint_has_baselines_of_its_own(matrix):
    files = {name for name in matrix.files("s/qsa_baselines") if name not in matrix.made}
    assert files == {
        f"s/qsa_baselines/{name}/{rest}.json"
        for name in ("first", "second")
        for rest in ("a/drift", "test_p/test_drift[input]", "test_p/test_drift[output]")
    }
    assert matrix.runs["named"].code == 0, matrix.runs["named"].out


def test_updating_named_checkpoints_leaves_the_suites_own_baselines(matrix):
    assert {name: matrix.files("s/qsa_baselines").get(name) for name in matrix.made} == matrix.made


def test_every_named_checkpoint_is_in_the_ids(matrix):
    assert set(matrix.runs["named"].outcomes) == {
        "s/a.qsa.yaml::drift[first]", "s/a.qsa.yaml::drift[second]",
        *(f"s/test_p.py::test_drift[{name}-{site}]" for name in ("first", "second") for site in ("input", "output")),
    }  # fmt: skip


def test_two_checkpoints_whose_folders_have_one_name_meet_the_same_baseline(own_project, llama, changed_llama):
    for version, folder in (("v1", llama), ("v2", changed_llama)):
        shutil.copytree(folder, own_project.folder / version / "int8")
    own_project.write("a.qsa.yaml", suite("v1/int8", peaks("baseline: {rel: 0.05}")))
    assert own_project.pytest("--snapshot-update", "--qsa-report=never").code == 0
    run = own_project.pytest("--qsa-model=v1/int8", "--qsa-model=v2/int8", "--qsa-report=never")
    assert len(run.outcomes) == 2
    assert sorted(run.outcomes.values()) == ["failed", "passed"]
    assert "there is no baseline yet" not in run.out
