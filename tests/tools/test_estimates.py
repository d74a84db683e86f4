"""`--qsa-plan`: what a run would take, before anything is loaded, against what it really takes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pytest_qsa.captures import AGREEMENT, COUNTS, TOKENS, Capture, Request
from pytest_qsa.checkpoint.folder import Folder
from pytest_qsa.metrics import METRICS
from pytest_qsa.suite import Data, FileHashes, Generation, Gpu, Machine, Memory, Model, Subject, fingerprint_of
from pytest_qsa.tools.checkpoint_sizes import sizes_of
from pytest_qsa.tools.estimates import COSTS, START, Work, own_setting, seconds_of, settings_of
from pytest_qsa.tools.explain_plan import MEMORY_FACTOR, Planned, gathered, plan_lines
from support.checkpoints import save_tokenizer
from support.projects import Project, suite

GB = 10**9
DEFAULT = Memory()
LAPTOP = Machine(8, 24 * GB, 22 * GB, (), {"cpu": 1e12}, 2e9)
WORKSTATION = Machine(8, 64 * GB, 60 * GB, (Gpu("a GPU", 24 * GB, 23 * GB),), {"cpu": 1e12, "cuda": 1e14}, 2e9)
SEVENTY_B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
BLOCK_70B = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
OUTER_70B = 128256 * 8192


def shapes_70b():
    """Yield the name and the shape of each tensor of Llama-3-70B."""
    hidden, inner = 8192, 28672
    yield "model.embed_tokens.weight", (128256, hidden)
    for block in range(80):
        front = f"model.layers.{block}"
        for name, rows in (("q_proj", hidden), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", hidden)):
            yield f"{front}.self_attn.{name}.weight", (rows, hidden)
        yield f"{front}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{front}.mlp.up_proj.weight", (inner, hidden)
        yield f"{front}.mlp.down_proj.weight", (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{front}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (128256, hidden)


@pytest.fixture(scope="module", params=["an index", "headers"])
def seventy_b(request, tmp_path_factory):
    """Return the folder of a Llama-3-70B: its index alone, or a file of headers whose weights are a hole."""
    folder = tmp_path_factory.mktemp("70b")
    (folder / "config.json").write_text(json.dumps(SEVENTY_B))
    shapes = dict(shapes_70b())
    if request.param == "an index":
        total = 2 * sum(prod(shape) for shape in shapes.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict.fromkeys(shapes, "model-00001-of-00030.safetensors"),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        yield folder
        return
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * prod(shape)]}
        end += 2 * prod(shape)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_qsa.common.files.SPARSE", 1 << 62)  # which refuses such a file to users
        yield folder


def plan_of(folder, machine, memory=DEFAULT):
    """Return the plan's text for outlier tokens of all blocks."""
    request = Request(r"layers\.\d+$", "output", None, frozenset({TOKENS, COUNTS}))
    subject = Subject("big", Model(path=str(folder)), Data(num_samples=64, seq_len=1024), memory, Path())
    return "\n".join(plan_lines([Planned(subject, [("outliers", request)])], None, lambda dtype, weights: machine))


def rows_of(text):
    """Return what the plan's table says of each setting: what it takes, and whether it fits."""
    found = re.findall(r"^  (\{.*?\})  +(.*?)(?:  +\S+ (?:s|min|h)){2} +(yes|no)(.*)$", text, flags=re.MULTILINE)
    return {setting: (takes, fits, rest) for setting, takes, fits, rest in found}


def test_a_70b_in_24_gb_is_told_to_stream_from_disk(seventy_b):
    text = plan_of(seventy_b, LAPTOP)
    rows = rows_of(text)
    assert "70.6 G parameters, 141 GB" in text
    assert rows["{device: cpu}"][:2] == ("142 GB of 22 GB", "no")
    assert rows["{device: cpu, auto_offload: true}"][1] == "yes"
    assert "the suite's  fetches 123 GB again for each of 64 batches" in rows["{device: cpu, auto_offload: true}"][2]
    assert rows["{device: cpu, offload_device: disk}"][1] == "yes"
    assert "→ memory: {device: cpu, offload_device: disk}" in text


def test_a_70b_beside_a_gpu_of_24_gb_streams_over_the_gpu(seventy_b):
    text = plan_of(seventy_b, WORKSTATION)
    assert rows_of(text)["{device: cuda}"][1] == "no"
    assert "→ memory: {device: cuda, offload_device: disk}" in text


def test_a_busy_machine_lengthens_the_time_and_not_that_of_the_processor(seventy_b):
    busy = replace(LAPTOP, free_cores=2.0)
    (idle, *_), (slow, *_) = (settings_with(seventy_b, machine) for machine in (LAPTOP, busy))
    assert slow.processor == idle.processor
    # The files are read as fast as they were just now; 8 threads on 2 cores take four times as long.
    reading = 141.1 * GB / LAPTOP.reading
    assert slow.seconds - START - reading == pytest.approx(4 * (idle.seconds - START - reading), rel=1e-3)
    assert "2.0 of its cores free" not in plan_of(seventy_b, busy)  # one thread waits for nobody
    assert "0.4 of its cores free over two seconds" in plan_of(seventy_b, replace(LAPTOP, cores=1, free_cores=0.4))


def settings_with(folder, machine):
    sizes = sizes_of(Folder(folder), Model(path=str(folder)))
    request = Request(r"layers\.\d+$", "output", None, frozenset({TOKENS}))
    return settings_of(sizes, Work.of(Data(num_samples=64, seq_len=1024), [request], sizes), machine)


def test_a_comparison_takes_both_models_and_the_head_for_every_sample(seventy_b):
    sizes = sizes_of(Folder(seventy_b), Model(path=str(seventy_b)))
    data, request = Data(num_samples=64, seq_len=1024), Request("", "logits", None, frozenset({AGREEMENT}))
    work = Work.of(data, [request], sizes)
    assert (work.logits, work.sites) == (True, 0)
    head = 2 * 128256 * 8192 * 1024
    alone = replace(work, logits=False)
    assert work.flops(sizes) - alone.flops(sizes) == pytest.approx(63 * head, rel=1e-9)
    (one, *_), (two, *_) = (settings_of(sizes, work, LAPTOP, reference) for reference in (None, sizes))
    assert two.host - one.host == pytest.approx(sizes.weights, rel=0.05)
    # Both models are read and run; what they predict is reduced once.
    rate, words = LAPTOP.rates["cpu"] / LAPTOP.cores, COSTS["words"] * 64 * 1024 * 128256
    model = sizes.stored / LAPTOP.reading + seconds_of(work.amounts(sizes), rate)
    assert two.processor - one.processor == pytest.approx(model)
    assert one.processor - START - model == pytest.approx(words)


def test_a_setting_that_fits_needs_no_advice(seventy_b):
    assert "→" not in plan_of(seventy_b, LAPTOP, Memory(offload_device="disk"))


def test_where_nothing_fits_it_says_so(seventy_b):
    small = Machine(2, 4 * GB, 2 * GB, (), {"cpu": 1e11}, 1e9)
    assert "nothing fits here: lower data.seq_len or batch_size" in plan_of(seventy_b, small)


def test_streaming_a_70b_takes_two_units_and_the_states_that_wait(seventy_b):
    sizes = sizes_of(Folder(seventy_b), Model(path=str(seventy_b)))
    assert sizes.parameters == pytest.approx(80 * BLOCK_70B + 2 * OUTER_70B, rel=1e-3)
    assert sizes.streamed == pytest.approx(2 * (BLOCK_70B + OUTER_70B), rel=1e-3)
    work = Work.of(Data(num_samples=64, seq_len=1024), [], sizes)
    assert work.flops(sizes) / work.samples == pytest.approx(
        1024 * (2 * 80 * BLOCK_70B + 80 * 4 * 1024 * 8192 + 2 * OUTER_70B / 64), rel=1e-3
    )


@pytest.mark.parametrize("checkpoint", ["llama", "int8_llama"])
def test_the_sizes_are_those_of_the_loaded_model(request, checkpoint):
    from pytest_qsa.engine.load.models import load_model
    from pytest_qsa.engine.modules import layers_of

    folder = request.getfixturevalue(checkpoint)
    spec = Model(path=str(folder))
    sizes = sizes_of(Folder(folder), spec)
    original = str(request.getfixturevalue("llama"))
    whole = load_model(Model(path=original), original, DEFAULT, allow_code=False)
    named = {name for name, module in layers_of(whole.model).items() if any(True for _ in module.parameters())}
    assert sizes.parameters == sum(p.numel() for p in whole.model.parameters())
    assert sizes.weights == sum(p.numel() * p.element_size() for p in whole.model.parameters())
    assert named - {""} == set(sizes.layers.all)
    streamed = load_model(spec, str(folder), Memory(device="cpu", offload_device="disk"), allow_code=False)
    try:
        assert set(sizes.units) == {unit.name for unit in streamed.stream.units}
    finally:
        streamed.close()


def test_the_operations_are_those_that_torch_counts(llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 48, dtype=torch.long))
    sizes = sizes_of(Folder(llama), Model(path=str(llama)))
    work = Work.of(Data(num_samples=1, seq_len=48), [], sizes)
    norms = 4 * 2 * 32 * 2 * 48  # no products, and too few to be told apart
    assert work.flops(sizes) - norms == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_mixture_multiplies_only_the_experts_that_a_token_goes_to(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    sizes = sizes_of(Folder(tmp_path), Model(path=str(tmp_path)))
    experts = 2 * 8 * 3 * 16 * 32
    rest = sum(count for name, count in sizes.units.items() if "layers" in name) - experts
    assert sizes.trunk == pytest.approx(rest + experts / 4)


@pytest.fixture(scope="module")
def zeros(tmp_path_factory):
    """Return the folder of a Llama of 60 M parameters that are all zero: large enough for its memory to be seen."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("zeros") / "llama"
    config = LlamaConfig(
        vocab_size=320, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    yield folder
    shutil.rmtree(folder)


WATCH = """
import pathlib, re

def pytest_sessionstart():
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

def pytest_unconfigure():
    peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
    pathlib.Path("peak.txt").write_text(peak)
"""


def expected_peak(folder, place):
    """Return the bytes that a plan says for two samples of 32 tokens on the CPU."""
    sizes = sizes_of(Folder(folder), Model(path=str(folder)))
    settings = settings_of(sizes, Work.of(Data(num_samples=2, seq_len=32), [], sizes), LAPTOP)
    return own_setting(settings, Memory(device="cpu", offload_device=place)).host


PYTHON = """
import pytest

@pytest.mark.qsa(layers="down_proj$", site="input", metric="rms")
def test_marked(qsa):
    raise AssertionError("it ran")

def test_unmarked(qsa):
    raise AssertionError("it ran")

def test_other():
    raise AssertionError("it ran")
"""
NO_TORCH = "import sys\nsys.modules['torch'] = None\n"


@pytest.fixture(scope="module")
def planned(tmp_path_factory, zeros):
    """Return a project with gates of all kinds."""
    project = Project(tmp_path_factory.mktemp("planned") / "project")
    finite = r"id: finite, metric: zero_fraction, layers: 'layers\.\d$', site: output, min: 0.5"
    project.write("a.qsa.yaml", suite(zeros, finite, "id: files, metric: checkpoint_health, max: 99"))
    project.write("test_t.py", PYTHON)
    project.write("conftest.py", WATCH)
    return project


@pytest.mark.process
def test_a_plan_names_the_tests_and_runs_none(planned):
    run = planned.pytest("--qsa-plan", "--qsa-cache=empty", "--qsa-config=a.qsa.yaml")
    assert run.code == 0, run.out
    assert run.reports == {}
    assert "tests       2 from one pass, 1 from the files alone (files)" in run.out
    assert "1 without a qsa mark (test_unmarked): a pass each that nobody planned" in run.out
    assert r"output of 'layers\.\d$', 5 layers: moments  ← finite" in run.out
    assert "input of 'down_proj$', 5 layers: moments  ← test_marked" in run.out
    assert "data        2 × 32 tokens of sample, 1 at once" in run.out
    assert "kept        no capture" in run.out
    assert re.search(r"\{device: cpu\} .* yes  ← the suite's", run.out)


@pytest.mark.process
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_the_peak_of_a_real_run_is_within_the_stated_factor(planned, zeros, place):
    run = planned.pytest(
        "a.qsa.yaml::finite", f"--qsa-set=memory.offload_device={place}", "--qsa-report=never", "--qsa-no-cache"
    )
    assert run.code == 0, run.out
    peak = 1024 * int(planned.read("peak.txt"))
    assert 1 / MEMORY_FACTOR < peak / expected_peak(zeros, place) < MEMORY_FACTOR


@pytest.mark.process
def test_what_is_kept_is_not_planned_anew_and_needs_no_torch(planned):
    assert planned.pytest("a.qsa.yaml::finite", "--qsa-report=never").code == 0
    planned.write("conftest.py", NO_TORCH)
    try:
        run = planned.pytest("a.qsa.yaml", "--co", "--qsa-plan")
        files = planned.pytest("a.qsa.yaml::files", "--co", "--qsa-plan")
    finally:
        planned.write("conftest.py", WATCH)
    assert run.code == 0
    assert "kept        a capture that answers all of it: nothing would be loaded" in run.out
    assert "pass        none: no model is loaded" in files.out


def test_a_plan_finds_the_cached_capture_of_a_comparison(tmp_path, llama):
    subject = Subject("a", Model(path=str(llama), reference=str(llama)), Data(), Memory(), tmp_path)
    request = Request(r"layers\.\d$", "output", None, METRICS["sqnr"].needs("output", "all", {}))
    fingerprint = fingerprint_of(subject, FileHashes(None), with_reference=True)
    tokens = (np.arange(3, dtype=np.int32),)
    Capture(sites={}, modules=("a",), plan=(request,), tokens=tokens).save(tmp_path / f"{fingerprint}.qsa")
    lines = plan_lines([Planned(subject, [("close", request)])], tmp_path, lambda dtype, weights: LAPTOP)
    assert "kept        a capture that answers all of it: nothing would be loaded" in lines


def test_a_plan_of_weights_in_files_says_what_is_read_and_needs_no_machine(tmp_path, int8_llama, llama):
    model = Model(path=str(int8_llama), reference=str(llama), weights="files")
    subject = Subject("a", model, Data(), Memory(), tmp_path).of_files
    request = Request("_proj$", "weight", None, METRICS["weight_sqnr"].needs("weight", "all", {}))

    def measure(dtype, weights):
        pytest.fail("no model runs, so the machine is not measured")

    lines = list(plan_lines([Planned(subject, [("close", request)])], None, measure))
    assert "tests       1 from the weights in the files" in lines
    assert "sites       weight of '_proj$', 28 layers: error  ← close" in lines
    (weights,) = (line for line in lines if line.startswith("weights "))
    assert " in 1 file and " in weights
    assert weights.endswith(" of the reference, in about 1 s; no model is loaded")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (
            "org/nowhere",
            "size        not known: org/nowhere is not in the local cache of the hub; `hf download org/nowhere`",
        ),
        ("cut", "/cut/model.safetensors is cut short"),
        ("empty", "/empty is empty"),
    ],
)
def test_what_is_not_known_is_said(tmp_path, monkeypatch, llama, path, told):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "cut")
    (tmp_path / "cut/model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    text = plan_of(path, LAPTOP)
    assert told in text
    assert "size        not known: " in text


def test_tests_of_one_subject_share_a_pass(llama):
    subject = Subject("a", Model(path=str(llama)), Data(), Memory(), llama)
    one, other = (Request("x", "input", None, frozenset({s})) for s in (TOKENS, COUNTS))
    (planned,) = gathered([("a", subject, [one], False), ("b", subject, [other], False), ("c", subject, [], True)])
    assert planned.requests == (Request("x", "input", None, frozenset({TOKENS, COUNTS})),)
    assert planned.static == ["c"]


def test_a_plan_names_the_layers_whose_keys_a_cache_may_hold(llama):
    subject = Subject("a", Model(path=str(llama)), Data(num_samples=2, seq_len=64), Memory(), llama)
    request = Request("self_attn$", "key", None, METRICS["absmax"].needs("key", "all", {}))
    text = "\n".join(plan_lines([Planned(subject, [("keys", request)])], None, lambda dtype, weights: LAPTOP))
    assert "key of 'self_attn$', 4 layers that may fill it: moments  ← keys" in text


def test_a_plan_says_how_many_positions_a_bound_takes(llama):
    subject = Subject("a", Model(path=str(llama)), Data(num_samples=2, seq_len=64), Memory(), llama)
    request = Request("", "logits", None, METRICS["flips"].needs("logits", "all", {}))
    needed = {"few-flips": (381, "positions"), "stops": (35, "boundaries")}
    plans = gathered([("few-flips", subject, [request], False), ("stops", subject, [request], False)], needed)
    text = "\n".join(plan_lines(plans, None, lambda dtype, weights: LAPTOP))
    assert "sites       logits: margins  ← few-flips, stops" in text
    assert "positions   few-flips: its bound takes 381 or more, of 128 here" in text
    assert "boundaries  stops: its bound takes 35 or more, the answers to 2 prompts tell how many there are" in text


def test_a_plan_counts_the_answers_of_both_models_and_the_prompts_that_a_bound_takes(llama, seventy_b):
    asked, data = Generation(num_prompts=40, max_new_tokens=100), Data(num_samples=2, seq_len=64)
    request = Request("", "logits", None, METRICS["generation"].needs("logits", "all", {}))
    subject = Subject("a", Model(path=str(llama)), data, Memory(), llama, generation=asked)
    plans = gathered([("ends", subject, [request], False)], {"ends": (35, "prompts")})
    text = "\n".join(plan_lines(plans, None, lambda dtype, weights: LAPTOP))
    assert "answers     40 × at most 100 tokens, to prompts: builtin; by the model and by its reference" in text
    assert "prompts     ends: its bound takes 35 or more, of 40 here" in text
    assert "disk" not in text
    sizes = sizes_of(Folder(seventy_b), Model(path=str(seventy_b)))
    work = Work.of(data, [request], sizes, asked)
    # 300 steps of 16 prompts or fewer read all weights each: at 10 GB/s longer than their operations take at 1 PFLOP/s.
    assert work.answering(sizes, 1e15, 1e10) == pytest.approx(300 * sizes.weights / 1e10, rel=0.01)
    assert Work.of(data, [], sizes, asked).answers == (0, 0)
