"""The pass inside vLLM, without vLLM: its model's shape, its batches and its process are imitated here."""

import contextlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from pytest_qsa.captures import Capture
from pytest_qsa.common import InfraError, VllmProgram
from pytest_qsa.engine.vllm.capture import (
    _check_ranks as check_ranks,
    _settings as settings_of,
    _sites as joined_sites,
)
from pytest_qsa.engine.vllm.launch import run_program
from pytest_qsa.engine.vllm.program import RESULT
from pytest_qsa.engine.vllm.worker import Hooks, Samples, Worker
from pytest_qsa.suite import Data, Memory, Model, Subject, environment_of

HIDDEN, HEADS, HEAD, INNER = 16, 4, 4, 24
STATISTICS = ["moments", "tokens", "elements", "channels", "counts"]
SAMPLES = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]


class LinearBase(nn.Module):
    """A linear layer as vLLM's: it returns the bias apart, and may hold several layers in one."""

    def __init__(self, inputs, *outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(sum(outputs), inputs) / inputs**0.5, requires_grad=False)
        self.output_partition_sizes = list(outputs)
        self.quant_method = object()

    def forward(self, x):
        return x @ self.weight.T, None


class RMSNorm(nn.Module):
    def forward(self, x, residual=None):
        if residual is None:
            return x / x.square().mean(-1, keepdim=True).sqrt()
        residual += x  # in place, as the fused kernel does
        return residual / residual.square().mean(-1, keepdim=True).sqrt(), residual


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = LinearBase(HIDDEN, HEADS * HEAD, HEAD, HEAD)
        self.o_proj = LinearBase(HEADS * HEAD, HIDDEN)

    def forward(self, positions, hidden_states):
        return self.o_proj(self.qkv_proj(hidden_states)[0][:, : HEADS * HEAD])[0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = RMSNorm()
        self.self_attn = Attention()

    def forward(self, positions, hidden_states, residual):
        if residual is None:
            hidden, residual = self.input_layernorm(hidden_states), hidden_states.clone()
        else:
            hidden, residual = self.input_layernorm(hidden_states, residual)
        return self.self_attn(positions=positions, hidden_states=hidden), residual


class ServedModel(nn.Module):
    """The shape of vLLM's Llama: packed rows, residual streams in two parts, fused projections."""

    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        self.embed_tokens = nn.Embedding(32, HIDDEN)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = RMSNorm()

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


@pytest.fixture
def served():
    torch.manual_seed(0)
    return ServedModel().requires_grad_(False)


def hooks_on(model, folder, wanted, samples=SAMPLES, drawn=None, **worker):
    job = {
        "samples": samples,
        "folder": str(folder),
        "blocks": ["layers.0", "layers.1"],
        "predictions": True,
        "wanted": [[layer, site, STATISTICS] for layer, site in wanted],
        "drawn": drawn or {},
    }
    return Hooks(model, job, Worker(**{"hidden_size": HIDDEN, "metadata": dict, **worker}))


def run(model, *batches):
    """Run packed batches; each is a list of (sample, first, end)."""
    for batch in batches:
        ids = [token for sample, first, end in batch for token in SAMPLES[sample][first:end]]
        positions = [position for _, first, end in batch for position in range(first, end)]
        model(input_ids=torch.tensor(ids), positions=torch.tensor(positions))


WHOLE = [[(0, 0, 5), (1, 0, 3)], [(2, 0, 4)]]
IN_PARTS = [[(0, 0, 2), (1, 0, 2)], [(1, 2, 3), (0, 2, 4), (2, 0, 1)], [(0, 4, 5), (2, 1, 4)]]
SITES = [
    ("layers.0", "input"), ("layers.1", "input"), ("layers.1", "output"), ("layers.1.input_layernorm", "input"),
    ("layers.1.self_attn.q_proj", "input"), ("layers.1.self_attn.q_proj", "output"),
    ("layers.1.self_attn.k_proj", "output"), ("layers.1.self_attn.v_proj", "output"),
    ("layers.1.self_attn.o_proj", "output"), ("layers.0.self_attn", "output"),
]  # fmt: skip


def streams(model, ids):
    """Return what each site has for one sample, computed apart in float64."""
    x = model.embed_tokens.weight[torch.tensor(ids)].double().numpy()
    found = {}
    for index, layer in enumerate(model.layers):
        found[f"layers.{index}", "input"] = found[f"layers.{index}.input_layernorm", "input"] = x
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True))
        weight = layer.self_attn.qkv_proj.weight.double().numpy()
        for name, rows in (("q_proj", slice(0, 16)), ("k_proj", slice(16, 20)), ("v_proj", slice(20, 24))):
            found[f"layers.{index}.self_attn.{name}", "input"] = normed
            found[f"layers.{index}.self_attn.{name}", "output"] = normed @ weight[rows].T
        attended = (normed @ weight[:16].T) @ layer.self_attn.o_proj.weight.double().numpy().T
        found[f"layers.{index}.self_attn", "output"] = found[f"layers.{index}.self_attn.o_proj", "output"] = attended
        x = found[f"layers.{index}", "output"] = x + attended
    return found


@pytest.mark.parametrize("batches", [WHOLE, IN_PARTS], ids=["packed", "chunked"])
def test_the_sites_of_packed_and_chunked_batches_are_those_of_the_checkpoint(served, tmp_path, batches):
    hooks = hooks_on(served, tmp_path, SITES)
    run(served, *batches)
    hooks.save(tmp_path / "rank.qsa")
    sites = Capture.load(tmp_path / "rank.qsa").sites
    for sample, ids in enumerate(SAMPLES):
        for site, expected in streams(served, ids).items():
            if site in sites:
                population = sites[site].sample.tolist().index(sample)
                np.testing.assert_allclose(sites[site].tokens_of(population), abs(expected).max(1), rtol=1e-4)
                np.testing.assert_allclose(sites[site].moment("mean")[population], expected.mean(), atol=1e-5)
    assert set(sites) == set(SITES)
    last = np.load(tmp_path / "hidden-0.npy").view(np.float32)
    x = streams(served, SAMPLES[0])["layers.1", "output"]
    np.testing.assert_allclose(last, x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batches", [WHOLE, IN_PARTS], ids=["packed", "chunked"])
def test_the_rows_that_a_recorded_reference_has_are_kept(served, tmp_path, batches):
    drawn = [("layers.1.self_attn.k_proj", "output"), ("layers.1", "output")]
    rows = [[0, 4], [2], [1, 3]]
    hooks = hooks_on(served, tmp_path, SITES, drawn={"sites": [list(site) for site in drawn], "rows": rows})
    run(served, *batches)
    hooks.save(tmp_path / "rank.qsa", tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz") as found:
        assert set(found.files) == {f"0 {site} {layer}" for layer, site in drawn}
        for layer, site in drawn:
            expected = [streams(served, ids)[layer, site][at] for ids, at in zip(SAMPLES, rows, strict=True)]
            kept = found[f"0 {site} {layer}"].view(np.float32)
            np.testing.assert_allclose(kept, np.concatenate(expected), rtol=1e-3, atol=1e-5)


def test_a_dummy_batch_is_counted_and_measured_nowhere(served, tmp_path):
    hooks = hooks_on(served, tmp_path, SITES, metadata=lambda: None)
    run(served, WHOLE[0])
    assert hooks.ignored == 1
    assert all(not probe.observer.owners for probe in hooks.probes)


def test_a_position_that_comes_twice_or_never_ends_the_run(served, tmp_path):
    hooks = hooks_on(served, tmp_path, SITES)
    run(served, [(0, 0, 5)])
    with pytest.raises(InfraError, match="position 0, which no sample lacks"):
        run(served, [(0, 0, 5)])
    with pytest.raises(InfraError, match="ran 0 of the 3 tokens of sample 1"):
        hooks.save(tmp_path / "rank.qsa")


def test_other_tokens_than_the_samples_end_the_run():
    with pytest.raises(InfraError, match="the token 99 at position 0"):
        Samples(SAMPLES).segments(np.array([99, 2]), np.array([0, 1]))


def test_requests_whose_positions_seem_to_go_on_are_told_apart_by_their_tokens():
    samples = Samples([[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8]])
    samples.segments(np.array([1, 2, 5, 6, 7]), np.array([0, 1, 0, 1, 2]))
    segments = samples.segments(np.array([3, 4, 8, 5, 6, 7, 8]), np.array([2, 3, 3, 0, 1, 2, 3]))
    assert [(each.sample, each.position, each.end - each.start) for each in segments] == [
        (0, 2, 2),
        (1, 3, 1),
        (2, 0, 4),
    ]


@pytest.mark.parametrize(("layer", "site"), [("layers.0.mlp.act_fn", "output"), ("lm_head", "input")])
def test_a_layer_that_vllm_never_calls_is_refused_by_name(served, tmp_path, layer, site):
    with pytest.raises(InfraError, match=f"no layer {layer}: exclude it"):
        hooks_on(served, tmp_path, [(layer, site)])


def test_a_layer_that_vllm_runs_past_is_refused_by_name(served, tmp_path):
    """As one whose compiled class calls `forward` past its hooks."""
    served.layers[1].unused = LinearBase(HIDDEN, HIDDEN)
    hooks = hooks_on(served, tmp_path, [("layers.1", "output"), ("layers.1.unused", "output")])
    run(served, *WHOLE)
    with pytest.raises(InfraError, match=r"called layers\.1\.unused for 0 of 3 samples: it runs past its output"):
        hooks.save(tmp_path / "rank.qsa")


def test_vllm_runs_eagerly_without_a_prefix_cache_and_from_safetensors(tmp_path):
    """Else hooks aren't called, tokens that were seen before don't run, and files may run code."""
    spec = Model(path=str(tmp_path), engine={"name": "vllm", "max_num_seqs": 2, "kv_cache_dtype": "fp8"})
    found = settings_of(Subject("subject", spec, Data(), Memory(), tmp_path).named, SAMPLES)
    fixed = {"enforce_eager": True, "enable_prefix_caching": False, "load_format": "safetensors"}
    assert fixed.items() <= found.items()
    assert (found["max_num_seqs"], found["kv_cache_dtype"]) == (2, "fp8")


def test_replicated_key_heads_of_tensor_parallel_ranks_count_once(served, tmp_path):
    """Each of two ranks holds the one head of keys, and half of the heads of queries."""
    for layer in served.layers:
        layer.self_attn.qkv_proj = column = ColumnParallelLinear(HIDDEN, HEADS * HEAD, HEAD, HEAD)
        column.num_kv_head_replicas, column.gather_output = 2, False
    wanted = [("layers.0.self_attn.q_proj", "output"), ("layers.0.self_attn.k_proj", "output")]
    hooks = hooks_on(served, tmp_path, wanted, ranks=2, gathered=lambda x: torch.cat([x, x], dim=-1))
    run(served, *WHOLE)
    hooks.save(tmp_path / "rank.qsa")
    sites = Capture.load(tmp_path / "rank.qsa").sites
    assert sites[wanted[0]].shape[-1] == 2 * HEADS * HEAD
    assert sites[wanted[1]].shape[-1] == HEAD


def test_each_stage_of_a_pipeline_measures_its_own_layers(served, tmp_path):
    class PPMissingLayer(nn.Identity):
        def forward(self, positions, hidden_states, residual):
            return hidden_states, residual

    served.layers[0] = PPMissingLayer()
    hooks = hooks_on(served, tmp_path, [("layers.0.self_attn", "output"), ("layers.1", "input")], stages=2)
    assert [next(iter(probe.sites)) for probe in hooks.probes] == [("layers.1", "input")]


def test_the_layers_of_all_stages_are_joined_and_one_that_none_has_is_refused_by_name(served, tmp_path):
    """Two workers leave a file each, of their own layers."""
    apart = [("layers.0", "output"), ("layers.1", "output")]
    for rank, site in enumerate(apart):
        hooks = hooks_on(served, tmp_path, [site])
        run(served, *WHOLE)
        hooks.detach()
        hooks.save(tmp_path / f"rank-{rank}.qsa")
    found = joined_sites(tmp_path, dict.fromkeys(reversed(apart)))
    assert list(found) == apart[::-1]
    for sample, ids in enumerate(SAMPLES):
        for site in apart:
            expected = abs(streams(served, ids)[site]).max(1)
            np.testing.assert_allclose(found[site].tokens_of(sample), expected, rtol=1e-4)
    with pytest.raises(InfraError, match=r"called no layer layers\.2 \(output\): exclude it"):
        joined_sites(tmp_path, dict.fromkeys([*apart, ("layers.2", "output")]))


def test_ranks_that_hold_different_copies_of_one_tensor_are_refused_by_name(served, tmp_path):
    def sums(factor):
        hooks = hooks_on(served, tmp_path, [("layers.1", "output"), ("layers.0", "output")], ranks=2)
        with torch.no_grad():
            served.layers[1].self_attn.o_proj.weight *= factor
        run(served, *WHOLE)
        hooks.detach()
        return {"sums": hooks.sums}

    one, other = sums(1.0), sums(1.1)
    check_ranks({"collected": [one, one]})
    with pytest.raises(InfraError, match=r"different numbers at layers\.1 output"):
        check_ranks({"collected": [one, other]})


class ColumnParallelLinear(LinearBase):
    pass


def interpreter(tmp_path, body):
    """Return a program that stands for the interpreter of vLLM's environment; `job` is its job."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport json, os, pathlib, subprocess, sys, time\n{body}\n")
    program.chmod(0o755)
    return VllmProgram(str(program), {})


def alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.process
@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("time.sleep(60)", "vLLM took longer than model.engine.timeout, 2 s; the last that it said: loading"),
        (
            "print('(EngineCore) ValueError: no KV blocks left', flush=True); "
            "print('RuntimeError: Engine core initialization failed. See above', flush=True); sys.exit(1)",
            "vLLM ended before it had run the samples (exit code 1): ValueError: no KV blocks left",
        ),
        (
            "print('(MainProcess) WARNING ValueError: Tokenizer not available', flush=True); "
            "print('ERROR Worker proc VllmWorker-0 died unexpectedly (exit code: -11), shutting down', flush=True); "
            "print('EngineDeadError: EngineCore encountered an issue', flush=True); sys.exit(1)",
            "vLLM ended before it had run the samples (exit code 1): Worker proc VllmWorker-0 died unexpectedly "
            "(exit code: -11)",
        ),
        (
            "print('(Worker_TP1) ERROR pytest_qsa.common.errors.InfraError: vLLM ran 3 of the 5 tokens', flush=True); "
            "print('EngineDeadError: EngineCore encountered an issue', flush=True); sys.exit(1)",
            "vLLM ran 3 of the 5 tokens",
        ),
        ("os.kill(os.getpid(), 9)", "vLLM ended before it had run the samples (killed by SIGKILL): loading"),
    ],
    ids=["timeout", "refused", "worker", "hook", "killed"],
)
def test_a_run_of_vllm_that_fails_is_one_line_and_leaves_no_process(tmp_path, ending, message):
    child = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    body = f"{child}\npathlib.Path('pid').write_text(str(child.pid))\nprint('loading', flush=True)\n{ending}"
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(InfraError) as raised:
        run_program(interpreter(tmp_path, body), {}, folder, {}, timeout=2)
    assert str(raised.value) == message
    pid = int((folder / "pid").read_text())
    ends = time.monotonic() + 5
    while alive(pid) and time.monotonic() < ends:  # until init has waited for it
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.process
def test_a_vllm_that_was_edited_in_place_is_another_environment(tmp_path):
    """Else the cache would answer for the kernel that somebody has just mended."""
    package, facts = tmp_path / "site" / "vllm", tmp_path / "site" / "vllm-0.32.0.dist-info"
    for folder in (package, facts):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    (facts / "RECORD").write_text("vllm-0.32.0.dist-info/RECORD,,\n")
    program = interpreter(tmp_path, f"sys.path.insert(0, {str(package.parent)!r}); exec(sys.argv[-1], {{}})")

    def environment(edited=0):
        if edited:
            later = time.time() + edited
            os.utime(package / "__init__.py", (later, later))
        environment_of.cache_clear()
        return environment_of(program.python)

    installed = environment()
    assert "edited" not in installed
    assert len({installed["vllm"], environment(60)["edited"], environment(90)["edited"]}) == 3


@pytest.mark.process
def test_vllm_ends_when_the_process_that_started_it_is_killed():
    """The kernel then closes the pipe that is the program's standard input."""
    sleeping = "import time; time.sleep(60)"
    body = (
        "import subprocess, sys, threading; from pytest_qsa.engine.vllm import program; "
        f"print(subprocess.Popen([sys.executable, '-c', '{sleeping}']).pid, flush=True); program._end_with_parent()"
    )
    starts = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", body], **starts) as process:
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.stdin.close()
        assert process.wait(20) == -9
    ends = time.monotonic() + 5
    while alive(pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.process
def test_the_program_of_vllm_gets_neither_the_users_path_nor_telemetry(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    names = "('PYTHONPATH', 'VLLM_NO_USAGE_STATS', 'VLLM_CPU_KVCACHE_SPACE')"
    body = f"pathlib.Path({RESULT!r}).write_text(json.dumps({{name: os.environ.get(name) for name in {names}}}))"
    folder = tmp_path / "run"
    folder.mkdir()
    result = run_program(interpreter(tmp_path, body), {}, folder, {"VLLM_CPU_KVCACHE_SPACE": "2"}, timeout=20)
    assert result == {"PYTHONPATH": str(folder), "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"python": "3.12.1"}, "has no vLLM: install it there"),
        ({"python": "3.12.1", "vllm": "0.9.2"}, "has vLLM 0.9.2, and captures are tested with 0.32 up to but not 0.33"),
        ({"python": "3.10.1", "vllm-cpu": "0.32.0"}, "is Python 3.10.1, and the capture needs 3.11"),
        ("nonsense", "is no Python that has vLLM"),
    ],
    ids=["absent", "old", "old-python", "no-python"],
)
def test_an_environment_without_a_tested_vllm_is_refused(tmp_path, versions, message):
    program = interpreter(tmp_path, f"print({json.dumps(versions)!r} if {versions != 'nonsense'} else 'hello')")
    with pytest.raises(InfraError, match=message):
        environment_of(program.python)
