"""The class that a checkpoint's configuration names is the one that is loaded, whatever its task."""

import pytest
from checkpoint_folders import Project, save_tokenizer

BLOCKS = r"(block|layer|layers|h)\.\d+$"


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=320, decoder_start_token_id=0, **sizes))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=320, **sizes))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return MixtralForCausalLM(MixtralConfig(vocab_size=320, num_key_value_heads=2, num_local_experts=4, **sizes))


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    text = LlamaConfig(vocab_size=320, num_key_value_heads=2, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=319))


MODELS = {"t5": t5, "bert": bert, "mixtral": mixtral, "llava": llava}


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
    assert f"REGRESSION blocks: {COUNTS[name]} of {COUNTS[name]} layers" in run.first_line(test)
    assert f"; {CLASSES[name]} float32 on cpu, executed as float;" in run.labelled(test)["ran"][0]
