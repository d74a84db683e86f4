"""The class that a checkpoint's configuration names is the one that is loaded, whatever its task."""

import pytest

from support.architectures import MODELS
from support.checkpoints import save_tokenizer
from support.projects import Project

pytestmark = pytest.mark.process

BLOCKS = r"(block|layer|layers|h)\.\d+$"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import torch

    project = Project(tmp_path_factory.mktemp("architectures") / "project")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(project.folder / name)
        save_tokenizer(project.folder / name)
        blocks = r"language_model\.layers\.\d+$" if name == "llava" else BLOCKS
        project.write(
            f"{name}.qsa.yaml",
            f"model: {{path: {name}}}\ndata: {{num_samples: 2, seq_len: 48}}\nassertions:\n"
            f"  - {{id: blocks, metric: outlier_ratio, positions: no_sink, layers: '{blocks}', site: output,"
            " max: 1}\n",
        )
    return project.pytest("--qsa-report=never")


CLASSES = {
    "t5": "T5ForConditionalGeneration", "bert": "BertForMaskedLM", "mixtral": "MixtralForCausalLM",
    "llava": "LlavaForConditionalGeneration",
}  # fmt: skip
COUNTS = {"t5": 14, "bert": 3, "mixtral": 2, "llava": 2}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_any_task_is_run_as_the_class_that_it_names(run, name):
    test = f"{name}.qsa.yaml::blocks"
    assert f"; {COUNTS[name]} of {COUNTS[name]} layers are out of bounds" in run.first_line(test)
    assert f"; {CLASSES[name]} float32 on cpu, executed as float;" in run.labelled(test)["ran"][0]
