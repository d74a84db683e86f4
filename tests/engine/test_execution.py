"""What a quantized model is really run as, where the suite requires something else, and modules that never run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from pytest_qsa.captures import MOMENTS, Request
from pytest_qsa.engine.formats.torchao import TorchAoModules
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.run.observed_execution import ObservedExecution
from pytest_qsa.engine.subject import capture_loaded, capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject
from pytest_qsa.tools.diff.sides import read_side
from support.checkpoints import edited, save_gpt_oss, save_quantized_llama
from support.projects import Project, peaks, suite

BLOCKS = Request(r"layers\.\d$", "output", None, frozenset({MOMENTS}))
WEIGHTS = Request("down_proj$", "weight", None, frozenset({MOMENTS}))


def subject_of(folder, **memory):
    data = Data(num_samples=1, seq_len=16)
    return Subject("llama", Model(path=str(folder)), data, Memory(device="cpu", **memory), folder.parent)


def told(folder, request=BLOCKS, **memory):
    return capture_subject(subject_of(folder, **memory), [request]).provenance.executed_as


def dequantizing(config):
    config["quantization_config"]["dequantize"] = True


def too_small(weights):
    for name in weights:
        if name.endswith(".input_scale"):
            weights[name] = weights[name] / 50


@pytest.fixture(scope="module")
def unpacked(quantized, tmp_path_factory):
    """Return the int8 checkpoint, its configuration asking for weights that are dequantized when they are loaded."""
    return edited(quantized["int8"], tmp_path_factory.mktemp("unpacked") / "int8", config=dequantizing)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("int8", "W8A8 emulated (28 modules)"),
        ("int8 weights", "W8A16 weights only (28 modules)"),
        ("int4", "W4A16 weights only (28 modules)"),
        ("fp8 with static inputs", "W8A8 FP emulated (28 modules)"),
        ("fp8 by channel", "W8A8 FP emulated (28 modules)"),
        ("torchao int8", "W8A16 weights only (28 modules)"),
        ("torchao int4", "W4A16 weights only (28 modules)"),
        ("float", "float"),
    ],
)
def test_a_capture_tells_what_each_format_was_executed_as(quantized, form, words):
    assert told(quantized[form]) == words


def test_a_streamed_model_tells_it_too_and_modules_after_the_last_site_are_not_missed(quantized):
    request = Request(r"layers\.1$", "output", None, frozenset({MOMENTS}))
    assert told(quantized["int8"], request, offload_device="disk") == "W8A8 emulated (14 modules)"


def test_weights_that_the_loader_unpacked_are_executed_as_weights_only(unpacked):
    assert told(unpacked) == "weights only, dequantized when loaded: dequantize in config.json (28 modules)"


def to_fp8(weights):
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.ones(1, 1)


def declared_as_fp8(config):
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the codes themselves")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder, llama: edited(llama, folder, to_fp8, config=declared_as_fp8), "fp8 without a GPU (28 modules)"),
        (lambda folder, llama: save_gpt_oss(folder), "mxfp4 without a GPU (8 modules)"),
    ],
    ids=["fp8", "gpt-oss"],
)
def test_what_a_loader_dequantizes_without_a_gpu_says_so(llama, tmp_path, make, words):
    assert told(make(tmp_path / "made", llama)) == f"weights only, dequantized when loaded: {words}"


def test_inputs_in_fp8_are_told_beside_weights_in_int4(llama, tmp_path):
    folder = save_quantized_llama(tmp_path / "w4afp8", llama, "W4AFP8", group_size=16)
    assert told(folder) == "W4A8 FP emulated (28 modules)"


def test_a_comparison_of_two_captures_says_it_of_each(quantized, unpacked, tmp_path):
    for name, folder in {"before": quantized["int8"], "after": unpacked}.items():
        capture_subject(subject_of(folder), [BLOCKS]).save(tmp_path / f"{name}.qsa")
    before, after = (read_side(str(tmp_path / f"{name}.qsa")).title for name in ("before", "after"))
    assert "executed as W8A8 emulated (28 modules)" in before
    assert "executed as weights only, dequantized when loaded: dequantize in config.json (28 modules)" in after


def test_weights_alone_need_no_forward_and_say_so(quantized):
    assert told(quantized["int8"], WEIGHTS) == "nothing, no forward ran"


def test_inputs_that_are_not_rounded_are_told_whatever_the_configuration_declares(quantized):
    model = load_model(Model(path=str(quantized["int8"])), str(quantized["int8"]), Memory(), allow_code=False)
    for module in model.model.model.layers[1].modules():
        module.quantization_enabled = False
    capture = capture_loaded(subject_of(quantized["int8"]), model, None, [BLOCKS])
    assert capture.provenance.executed_as == "W8A8 emulated (21 modules), W8A16 weights only (7 modules)"


def torchao_kinds(llama, dtype, config):
    """Quantize a model by a configuration of torchao, run it, and return what was observed."""
    from torchao.quantization import quantize_

    model = load_model(Model(path=str(llama)), str(llama), Memory(), allow_code=False).model.to(dtype)
    quantize_(model, config)
    execution = ObservedExecution(model)
    with torch.no_grad(), ExitStack() as exits:
        execution.begin(exits)
        model(torch.arange(16)[None])
    return list(execution.execution().kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchao_inputs_that_are_rounded_as_they_come_are_seen(llama, dtype):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerAxis

    config = Int8DynamicActivationIntxWeightConfig(weight_granularity=PerAxis(0))
    assert torchao_kinds(llama, dtype, config) == ["W8A8 emulated"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("Int8DynamicActivationInt8WeightConfig", "W8A8 by kernels"),
        ("Int8WeightOnlyConfig", "W8A16 weights only"),
        ("Float8WeightOnlyConfig", "W8A16 FP weights only"),
    ],
)
def test_torchao_says_its_bits(llama, config, words):
    import torchao.quantization

    assert torchao_kinds(llama, torch.bfloat16, getattr(torchao.quantization, config)()) == [words]


def test_the_scheme_of_a_torchao_tensor_is_that_of_its_class_and_its_inputs():
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Int4Tensor

    weight, fp4 = torch.randn(32, 64, dtype=torch.bfloat16), torch.float4_e2m1fn_x2
    packed, scales = torch.zeros(32, 32, dtype=torch.int8), torch.ones(2, 32)
    float_inputs = QuantizeTensorToMXKwargs(elem_dtype=torch.float8_e4m3fn)
    tensors = [
        (NVFP4Tensor.to_nvfp4(weight), "w4a16_fp", False),
        (MXTensor.to_mx(weight, torch.float8_e4m3fn, 32), "w8a16_fp", False),
        (MXTensor.to_mx(weight, fp4, 32, act_quant_kwargs=float_inputs), "w4a8_fp", True),
        (Int4Tensor(packed, scales, scales, [1, 32], weight.shape), "w4a16_int", False),
        (
            Int4Tensor(packed, scales, scales, [1, 32], weight.shape, activation_dtype=torch.float8_e4m3fn),
            "w4a8_int",
            True,
        ),
    ]
    for tensor, scheme, floats in tensors:
        module = torch.nn.Linear(64, 32, bias=False)
        module.weight = torch.nn.Parameter(tensor, requires_grad=False)
        form = TorchAoModules()
        assert form.owns(module)
        assert (form.scheme(module), form.rounds_to_floats(module)) == (scheme, floats), type(tensor)


def of_model(text, *keys):
    """Add keys to the section `model` of a suite."""
    return text.replace("model: {", f"model: {{{', '.join(keys)}, ")


def required(path, ways, *assertions):
    return of_model(suite(path, *(assertions or [peaks("max: 40")])), f"require: {{executed_as: {ways}}}")


IDLE = """
import copy
from transformers import AutoModelForCausalLM, AutoTokenizer

def made():
    model = AutoModelForCausalLM.from_pretrained({path!r})
    model.model.layers[2].mlp.spare_proj = copy.deepcopy(model.model.layers[2].mlp.up_proj)
    return model, AutoTokenizer.from_pretrained({path!r})
"""


@pytest.fixture(scope="module")
def run(quantized, unpacked, tmp_path_factory):
    """Run suites that require how their model is executed, all in one run."""
    project = Project(tmp_path_factory.mktemp("required") / "project")
    static = quantized["fp8 with static inputs"]
    broken = edited(static, tmp_path_factory.mktemp("broken") / "fp8", too_small)
    dropping = edited(broken, tmp_path_factory.mktemp("dropping") / "fp8", config=dequantizing)
    original, lax = f"reference: {quantized['float']}", "allow_unexpected: input_scale$"
    close = "id: close, metric: sqnr, layers: 'layers.3$', min: 5"
    project.write("idle.py", IDLE.format(path=str(quantized["int8"])))
    factory = suite("x", peaks("max: 40")).replace("path: x", "factory: 'idle:made'")
    weights = "id: weights, metric: rms, layers: down_proj$, site: weight, max: 40"
    for name, text in {
        "as-required": required(quantized["int8"], "W8A8 emulated"),
        "one-of-two": required(quantized["int4"], "[W8A8 emulated, weights only]"),
        "unpacked": required(unpacked, "emulated"),
        "float": required(quantized["float"], "weights only"),
        "weights-alone": required(quantized["int8"], "W8A8", weights),
        "not-required": suite(unpacked, peaks("max: 1")),
        "noisy": suite(quantized["torchao int4"], peaks("max: 1")),
        "idle": factory,
        "idle-allowed": of_model(factory, "allow_idle: spare_proj$"),
        "broken": of_model(suite(broken, close), original),
        "broken-unpacked": of_model(required(dropping, "emulated", close), original, lax),
        "broken-unseen": of_model(suite(dropping, close), original, lax),
    }.items():
        project.write(f"{name}.qsa.yaml", text)
    result = project.pytest("--qsa-allow-code")
    return project, result, project.read("qsa-results/report.html")


@pytest.mark.process
@pytest.mark.parametrize("name", ["as-required", "one-of-two", "weights-alone", "idle-allowed"])
def test_a_model_that_runs_as_required_passes(run, name):
    _, result, _ = run
    assert [outcome for test, outcome in result.outcomes.items() if test.startswith(f"{name}.")] == ["passed"], (
        result.out
    )


OTHERWISE = {
    "unpacked": ("INFRA", "model.layers.0.mlp.down_proj"),
    "float": ("INFRA", "weights only"),
    "idle": ("ANOMALOUS", "model.layers.2.mlp.spare_proj"),
}


@pytest.mark.process
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_model_that_ran_otherwise_or_in_part_fails_and_names_the_module(run, name):
    _, result, _ = run
    text = next(report["text"] for test, report in result.reports.items() if test == f"{name}.qsa.yaml::peaks")
    kind, module = OTHERWISE[name]
    line = next(line for line in text.splitlines() if line.startswith("E   "))
    assert line.startswith(f"E   {kind} peaks: ")
    assert module in line


@pytest.mark.process
def test_a_failure_and_the_report_say_what_the_model_was_executed_as(run):
    _, result, report = run
    words = "weights only, dequantized when loaded: dequantize in config.json (28 modules)"
    assert words in result.labelled("not-required.qsa.yaml::peaks")["ran"][0]
    assert "W8A8 emulated (28 modules)" in result.out
    assert words in report


@pytest.mark.process
def test_what_torchao_says_of_other_machines_is_in_no_failure(run):
    _, result, _ = run
    assert "W4A16 weights only" in result.text("noisy.qsa.yaml::peaks")
    assert "Failed to load" not in result.out
    assert "Captured log" not in result.out
    assert "KernelPreference" not in result.out


@pytest.mark.process
def test_a_static_scale_that_is_too_large_is_seen_where_inputs_are_rounded_and_only_there(run):
    """With weights that are dequantized at load, the numbers are sound: only the requirement tells."""
    _, result, _ = run
    assert result.first_line("broken.qsa.yaml::close").startswith("REGRESSION")
    assert result.first_line("broken-unpacked.qsa.yaml::close").startswith("INFRA close: model.require")
    assert result.outcomes["broken-unseen.qsa.yaml::close"] == "passed"


@pytest.mark.process
def test_a_cached_capture_still_tells_and_meets_the_requirement(run):
    project, _, _ = run
    project.write("again.qsa.yaml", project.read("unpacked.qsa.yaml").replace("max: 40", "max: 41"))
    again = project.pytest("again.qsa.yaml")
    assert again.kind("::peaks") == "INFRA"
    assert "model.require" in again.first_line("::peaks")


@pytest.mark.process
def test_a_way_to_run_that_does_not_exist_is_refused_at_its_line(own_project):
    own_project.write("a.qsa.yaml", required("x", "W8A8 emulatd"))
    out = own_project.pytest().out
    assert "a.qsa.yaml:1" in out
    assert "executed_as 'W8A8 emulatd' is no way to run: write W8A8 emulated" in out


def test_what_is_allowed_and_required_of_a_run_changes_no_capture():
    def key(**keys):
        return Subject("a", Model(path="x", **keys), Data(), Memory(), Path()).key

    assert key() == key(allow_idle="vision")
    assert key(require={"executed_as": ["emulated"]}) == key(require={"executed_as": ["float"]})
    assert key() != key(dtype="float32")
