"""Layers of any architecture by what they are, `kind:blocks`; layers that can have no number are left out by name."""

import numpy as np
import pytest
import torch

from pytest_qsa import Capture, capture
from pytest_qsa.captures import known_kinds, match_layers
from pytest_qsa.common import AnomalyError, InfraError, SuiteError
from pytest_qsa.engine.modules import blocks_of, layers_of, with_experts
from pytest_qsa.suite import Anatomy
from pytest_qsa.tools.draft import Draft, _without
from pytest_qsa.verdicts.judge import left_out_text
from support.architectures import ALL, saved
from support.models import MIXTURES, llama, mixture, record, token_batch

BLOCKS = {
    "jamba": ("kind:blocks", "model.layers.", 4),
    "gemma3n": ("kind:blocks", "model.layers.", 4),
    "llava": ("kind:vision.blocks", "model.vision_tower.encoder.layers.", 2),
    "qwen3_vl": ("kind:blocks", "model.language_model.layers.", 2),
    "qwen2_audio": ("kind:audio.blocks", "model.audio_tower.layers.", 2),
    "t5": ("kind:encoder.blocks", "encoder.block.", 2),
    "whisper": ("kind:blocks", "model.decoder.layers.", 2),
    "clip": ("kind:vision.blocks", "vision_model.encoder.layers.", 2),
    "vit": ("kind:*.blocks", "vit.layers.", 2),
    "mamba2": ("kind:blocks", "backbone.layers.", 2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_of_each_part_of_a_model_have_one_portable_name(name):
    with torch.device("meta"):
        names = list(layers_of(ALL[name]()))
    pattern, start, count = BLOCKS[name]
    assert match_layers(names, pattern) == [f"{start}{index}" for index in range(count)]


def test_experts_norms_attention_and_linear_layers_are_named_by_kind():
    with torch.device("meta"):
        names = list(with_experts(layers_of(ALL["deepseek"]())))
    assert match_layers(names, "kind:attention") == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "model.layers.1.mlp.experts.3.down_proj" in match_layers(names, "kind:experts")
    assert not {*match_layers(names, "kind:linears")} & {*match_layers(names, "kind:experts")}
    assert "model.norm" in match_layers(names, "kind:norms", "self_attn")
    assert "model.layers.0.mlp.down_proj" in match_layers(names, "kind:linears")
    assert "lm_head" not in match_layers(names, "kind:linears")


def test_a_layer_that_is_replaced_has_the_kinds_of_the_new_one():
    model = llama(seed=0)
    assert "model.layers.0.mlp.up_proj" in match_layers(list(layers_of(model)), "kind:linears")
    model.model.layers[0].mlp.up_proj = torch.nn.RMSNorm(8)
    names = list(layers_of(model))
    assert "model.layers.0.mlp.up_proj" in match_layers(names, "kind:norms")
    assert "model.layers.0.mlp.up_proj" not in match_layers(names, "kind:linears")


def test_a_list_of_single_layers_is_one_of_blocks_where_there_is_no_other():
    alone = torch.nn.Module()
    alone.steps = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    assert blocks_of(alone) == ["steps.0", "steps.1", "steps.2"]
    alone.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2))
    assert blocks_of(alone) == ["layers.0", "layers.1"]


@pytest.fixture(scope="module")
def captured():
    sites = [("kind:blocks", "output"), ("kind:linears", "output"), ("kind:norms", "input")]
    return capture(llama(), [token_batch(2, 16)], sites=sites)


def test_a_portable_name_outlives_the_capture_file(captured, tmp_path):
    captured.save(tmp_path / "run.qsa")
    loaded = Capture.load(tmp_path / "run.qsa")
    blocks = loaded.output("kind:blocks").absmax()
    assert blocks.layers == [f"model.layers.{index}" for index in range(4)]
    assert loaded.output("kind:linears", exclude=r"mlp").absmax().layers[0] == "model.layers.0.self_attn.q_proj"
    assert known_kinds(loaded.modules) == known_kinds(captured.modules)


@pytest.mark.parametrize(
    ("pattern", "error", "says"),
    [
        ("kind:blokcs", SuiteError, "did you mean 'blocks'"),
        ("kind:", SuiteError, "names no kind of layer"),
        ("kind:vision.blocks", AnomalyError, r"the model has kind:attention \(4\), kind:blocks \(4\)"),
        ("kind:experts", AnomalyError, "no layer is 'kind:experts'"),
    ],
)
def test_a_portable_name_that_stands_for_nothing_is_told_with_those_that_do(captured, pattern, error, says):
    with pytest.raises(error, match=says):
        captured.output(pattern).absmax()


@pytest.mark.parametrize("rows", [1, 2])
def test_several_copies_of_the_residual_stream_are_channels_of_their_token(rows):
    torch.manual_seed(0)
    model, batch = ALL["gemma3n"]().eval(), token_batch(rows, 12)
    found = capture(model, [batch], sites=[("kind:blocks", "output")])
    for layer in found.blocks:
        with torch.no_grad():
            seen = []
            handle = model.get_submodule(layer).register_forward_hook(
                lambda module, args, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            model(batch)
            handle.remove()
        streams = seen[0].double().numpy()  # [streams, B, T, C]
        expected = np.abs(streams).max(axis=(0, 3))
        numbers = found.sites[layer, "output"]
        assert numbers.token_axis
        assert numbers.shape == (12, streams.shape[0] * 32)
        np.testing.assert_allclose(np.stack([numbers.tokens_of(row) for row in range(rows)]), expected, rtol=1e-6)


def test_as_many_samples_as_streams_are_refused_with_the_remedy():
    with pytest.raises(InfraError, match=r"set data\.batch_size to 1"):
        capture(ALL["gemma3n"]().eval(), [token_batch(4, 12)], sites=[("kind:blocks", "output")])


def test_a_layer_that_is_called_with_two_widths_is_told_by_its_name_and_costs_no_other():
    assert "llama4" in MIXTURES
    model, batch = mixture("llama4"), token_batch(1, 12)
    found = capture(model, [batch], sites=[(".", "output")])
    with pytest.raises(
        AnomalyError, match=r"output of model\.layers\.0\.self_attn\.qk_norm .* 32 channels and with 16"
    ):
        found.output("norm$").absmax()
    norms = found.output("kind:norms").absmax()
    assert norms.left_out == ["model.layers.0.self_attn.qk_norm", "model.layers.1.self_attn.qk_norm"]
    expected = np.abs(np.stack(record(model, [batch], "model.norm", "output"))).max()
    assert norms["model.norm"] == pytest.approx(expected, rel=1e-6)


def test_a_layer_that_is_never_called_is_left_out_of_a_kind_and_told():
    torch.manual_seed(0)
    found = capture(ALL["mamba"]().eval(), [token_batch(1, 12)], sites=[("kind:linears", "output")])
    series = found.output("kind:linears").magnitude("median")
    assert series.left_out == ["backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"]
    assert len(series) == 6
    assert "dt_proj (and 1 more), which the model never calls" in left_out_text(series.left_out)
    with pytest.raises(AnomalyError, match="never fired"):  # a name that the user wrote is no kind
        found.output(r"_proj$").magnitude("median")


def test_a_first_suite_excludes_a_layer_that_can_have_no_number_and_keeps_the_assertion():
    modules = [f"layers.{index}.{kind}" for index in range(3) for kind in ("dt_proj", "in_proj")]
    draft = Draft("", {"layers": r"_proj$"}, ("min",), (r"\.dt_proj$", r"\.in_proj$"))
    whole = _without(draft, [name for name in modules if "dt" in name], modules)
    assert (whole.keys["exclude"], whole.groups) == (r"\.dt_proj$", [r"\.in_proj$"])
    single = _without(draft, ["layers.1.dt_proj"], modules)
    assert match_layers(modules, r"_proj$", single.keys["exclude"]) == [m for m in modules if m != "layers.1.dt_proj"]
    assert single.groups == [*draft.groups]


def test_a_first_suite_names_the_kinds_of_all_parts_that_run():
    assert Anatomy(["model.layers.0", "model.layers.1"], []).portable("blocks") == "kind:blocks"
    both = Anatomy(["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"], [])
    assert both.portable("linears") == "kind:*.linears"


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch.compile itself
def test_a_compiled_model_is_measured_as_it_was_before(captured):
    compiled = llama()
    compiled.compile()
    compiled.model.layers[0].compile()
    calls = [compiled._compiled_call_impl, compiled.model.layers[0]._compiled_call_impl]
    for model in (torch.compile(llama()), compiled):
        found = capture(model, [token_batch(2, 16)], sites=[("kind:blocks", "output")])
        assert found.output("kind:blocks").rms().values.tolist() == captured.output("kind:blocks").rms().values.tolist()
    assert [compiled._compiled_call_impl, compiled.model.layers[0]._compiled_call_impl] == calls


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch.compile itself
def test_a_layer_that_torch_compile_wrapped_is_told_by_its_name():
    model = llama()
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp)
    with pytest.raises(InfraError, match=r"model\.layers\.1\.mlp is wrapped by torch\.compile .* module\.compile\(\)"):
        capture(model, [token_batch(1, 8)], sites=[("kind:blocks", "output")])


def test_a_model_whose_own_parameters_are_called_scales_has_no_scales_of_codes(tmp_path):
    from pytest_qsa.checkpoint import Files, open_folder, problems_of

    torch.manual_seed(0)
    saved("gemma3n", tmp_path)  # whose correct_output_scale is of any sign
    assert not problems_of(Files(open_folder(tmp_path)), "checkpoint_health")[1]
