"""memory.offload_device: disk. Weights are read block by block, once, and no bit of the capture changes."""

from __future__ import annotations

import gc
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qsa.captures import ALL_STATISTICS, COUNTS, TOKENS, Request
from pytest_qsa.common.errors import AnomalyError, InfraError, QsaWarning
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.engine.stream import disk, stream as streaming
from pytest_qsa.engine.stream.disk import Shards
from pytest_qsa.engine.subject import capture_loaded
from pytest_qsa.suite import Data, Memory, Model, Subject
from support.architectures import MODELS as ARCHITECTURES
from support.captures import differing
from support.checkpoints import save_tokenizer

EVERYWHERE = [Request(".", site, None, ALL_STATISTICS) for site in ("input", "output", "key", "value")]
EVERYWHERE.append(Request(r"proj$|\.[kqvo]$|dense$|norm$|head$|embed", "weight", None, frozenset({COUNTS})))


def llama(**overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    options = {"vocab_size": 320, "num_key_value_heads": 2, "initializer_range": 0.2, "dtype": torch.bfloat16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options, **overrides)).to(torch.bfloat16)


def albert():
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AlbertForMaskedLM(AlbertConfig(vocab_size=320, embedding_size=16, num_hidden_groups=2, **sizes))


MODELS = ARCHITECTURES | {
    "llama": lambda: llama(tie_word_embeddings=False),
    "tied": lambda: llama(tie_word_embeddings=True),
    "albert": albert,
}


@pytest.fixture(autouse=True)
def _matrices_of_small_models_are_mapped(monkeypatch):
    """As those of large models are; vectors are read."""
    monkeypatch.setattr(disk, "MAPPED_FROM", 512)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function: name → the checkpoint's folder, made when first asked for."""
    root = tmp_path_factory.mktemp("streaming")

    def folder(name):
        if not (root / name).exists():
            torch.manual_seed(0)
            MODELS[name]().save_pretrained(root / name, max_shard_size="60KB" if name == "llama" else "1GB")
            save_tokenizer(root / name)
        return root / name

    return folder


def captured(folder, requests=EVERYWHERE, *, samples=3, batch_size=1, stream=True, held=None, wave=None, **model):
    """Capture a folder; return the capture and its stream."""
    data = Data(num_samples=samples, seq_len=32, batch_size=batch_size)
    memory = Memory(device="cpu", offload_device="disk" if stream else "cpu")
    subject = Subject("x", Model(path=str(folder), **model), data, memory, folder.parent)
    loaded = load_model(subject.model, subject.path, memory, allow_code=False)
    try:
        if loaded.stream is not None and held is not None:
            loaded.stream.spill.limit = held
        return capture_loaded(subject, loaded, None, requests), loaded.stream
    finally:
        loaded.close()


def size_of(folder):
    """Return the bytes of a checkpoint's tensors."""
    total = 0
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        total += len(content) - 8 - int.from_bytes(content[:8], "little")
    return total


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_capture_equals_that_of_the_model_in_memory_to_the_last_bit(folders, name):
    whole, _ = captured(folders(name), stream=False)
    streamed, stream = captured(folders(name))
    assert stream is not None
    assert differing(whole, streamed) == []


def test_a_quantized_kv_cache_is_rounded_alike_in_a_streamed_pass(folders):
    plain, _ = captured(folders("llama"))
    whole, _ = captured(folders("llama"), stream=False, kv_cache="fp8_e4m3")
    streamed, _ = captured(folders("llama"), kv_cache="fp8_e4m3")
    assert differing(whole, streamed) == []
    assert ("model.layers.3", "output") in differing(plain, streamed)


@pytest.mark.parametrize("name", ["llama", "tied", "t5", "bert", "albert"])
def test_each_weight_is_read_once_however_many_samples_pass(folders, name):
    _, stream = captured(folders(name), samples=5)
    assert stream.shards.bytes_read <= size_of(folders(name))


@pytest.fixture
def stored(tmp_path):
    """Return the shards of one file, and its weights: large and small, of three dtypes, one at an odd address."""
    weights = {"a": torch.randn(64, 64), "b": torch.randn(3, 64, 64).bfloat16(), "small": torch.randn(8)}
    weights |= {
        "bytes": torch.arange(255, dtype=torch.uint8).repeat(5)[:1001],
        "odd": torch.arange(250).char().repeat(5),
    }
    file = str(tmp_path / "model.safetensors")
    save_file(weights, file)
    return Shards({name: {"safetensors_file": file} for name in weights}), weights, tmp_path / "model.safetensors"


@pytest.mark.parametrize("setting", [{}, {"MAPPED_FROM": 1 << 40}, {"MOST_MAPS": 1}, {"POPULATE_READ": 9999}])
def test_weights_are_equal_mapped_or_read(stored, monkeypatch, setting):
    shards, weights, _ = stored
    for name, value in setting.items():
        monkeypatch.setattr(disk, name, value)
    read = {name: shards.read(name, weight.shape) for name, weight in weights.items()}
    assert all(torch.equal(read[name], weight) and read[name].dtype == weight.dtype for name, weight in weights.items())
    assert all(tensor.data_ptr() % disk.ALIGNED == 0 for tensor in read.values())
    assert shards.bytes_read == sum(weight.nbytes for weight in weights.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="weights are read elsewhere")
def test_a_mapped_weight_ends_with_its_tensor_and_a_change_of_it_never_reaches_the_file(stored):
    shards, weights, file = stored
    before = file.read_bytes()
    tensor = shards.read("a", (64, 64))
    assert len(shards._maps) == 1
    tensor.zero_()
    assert file.read_bytes() == before
    assert torch.equal(shards.read("a", (64, 64)), weights["a"])
    del tensor
    gc.collect()
    assert len(shards._maps) == 0


def test_a_file_that_is_cut_short_while_it_is_streamed_is_told(stored):
    shards, _, file = stored
    shards.read("small", (8,))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AnomalyError, match=r"model\.safetensors is cut short: b ends at byte [\d,]+$"):
        shards.read("b", (3, 64, 64))


class Looped(torch.nn.Module):
    """Two blocks that are passed twice in turn."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


def test_a_block_that_is_visited_again_is_read_again(tmp_path):
    torch.manual_seed(0)
    model, file = Looped(), str(tmp_path / "model.safetensors")
    batches = [torch.randn(1, 5, 8) for _ in range(3)]
    requests = [Request("blocks", site, None, ALL_STATISTICS) for site in ("input", "output", "key", "value")]
    whole = run_pass(model, batches, requests)
    weights = model.state_dict()
    save_file(weights, file)
    index = {name: {"safetensors_file": file} for name in weights}
    stream = streaming.Stream(model.to("meta"), Shards(index), torch.device("cpu"))
    streamed = run_pass(model, batches, requests, stream=stream)
    assert differing(whole, streamed) == []
    assert stream.shards.bytes_read >= 2 * sum(weight.nbytes for weight in weights.values())


def test_batches_of_several_samples_are_streamed_as_they_are(folders):
    whole, _ = captured(folders("llama"), samples=4, batch_size=2, stream=False)
    streamed, _ = captured(folders("llama"), samples=4, batch_size=2)
    assert differing(whole, streamed) == []


def test_nothing_past_the_last_site_that_is_needed_is_read(folders):
    requests = [Request(r"layers\.1$", "output", None, frozenset({TOKENS}))]
    streamed, stream = captured(folders("llama"), requests)
    whole, _ = captured(folders("llama"), requests, stream=False)
    assert differing(whole, streamed) == []
    weights = {
        name: tensor for file in folders("llama").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    needed = ("embed", "layers.0.", "layers.1.", "layers.2.")  # the next block is read ahead
    assert stream.shards.bytes_read <= sum(t.nbytes for name, t in weights.items() if any(n in name for n in needed))


def test_weights_alone_need_no_forward(folders, monkeypatch):
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *_: pytest.fail("the model was run"))
    streamed, _ = captured(folders("llama"), [Request("proj$", "weight", None, frozenset({COUNTS}))])
    monkeypatch.undo()
    whole, _ = captured(folders("llama"), [Request("proj$", "weight", None, frozenset({COUNTS}))], stream=False)
    assert differing(whole, streamed) == []


def test_hidden_states_that_do_not_fit_wait_on_disk_and_come_back_whole(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    whole, _ = captured(folders("llama"), samples=6, stream=False)
    streamed, stream = captured(folders("llama"), samples=6, held=2 * 32 * 32 * 2)
    assert stream.spill.spilled_bytes > 0
    assert differing(whole, streamed) == []
    assert list(tmp_path.glob("qsa-*")) == []


def test_more_samples_than_may_wait_at_once_pass_in_waves(folders, monkeypatch):
    whole, _ = captured(folders("llama"), samples=5, stream=False)
    monkeypatch.setattr("pytest_qsa.engine.stream.stream.WAVE", 2)
    streamed, stream = captured(folders("llama"), samples=5)
    assert differing(whole, streamed) == []
    assert stream.shards.bytes_read > 2 * size_of(folders("llama"))


def test_no_weight_stays_in_memory_after_the_pass(folders):
    memory = Memory(device="cpu", offload_device="disk")
    subject = Subject("x", Model(path=str(folders("tied"))), Data(num_samples=2, seq_len=16), memory, folders("tied"))
    loaded = load_model(subject.model, subject.path, memory, allow_code=False)
    for _ in range(2):  # and it can run again
        capture_loaded(subject, loaded, None, EVERYWHERE)
        assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}
    loaded.close()


SCHEMES = ["W8A8", "W4A16", "FP8_DYNAMIC"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_are_unpacked_block_by_block_with_the_same_bits(folders, tmp_path, scheme):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = llama(tie_word_embeddings=False)
    group = preset_name_to_scheme(scheme, ["Linear"])
    if scheme == "W4A16":
        group.weights.group_size = 32
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if (quantized := getattr(module, "quantization_scheme", None)) is not None:
            shape = module.weight_scale.shape
            groups = module.weight.float().reshape(shape[0], shape[-1], -1)
            largest = 448.0 if quantized.weights.type == "float" else 2.0 ** (quantized.weights.num_bits - 1) - 1
            module.weight_scale.data = (groups.abs().amax(-1) / largest).to(module.weight_scale.dtype)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(str(tmp_path))
    save_tokenizer(tmp_path)
    whole, _ = captured(tmp_path, stream=False)
    streamed, stream = captured(tmp_path)
    assert differing(whole, streamed) == []
    assert stream.shards.bytes_read <= size_of(tmp_path)
    _, stream = captured(tmp_path, [Request(r"layers\.0$", "output", None, frozenset({TOKENS}))])
    assert stream.shards.bytes_read < size_of(tmp_path) * 3 / 4


def test_what_transformers_cannot_leave_on_disk_is_refused_by_its_name(folders, tmp_path):
    config = json.loads((folders("tied") / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folders("tied") / "model.safetensors").read_bytes())
    for method in ("torchao", "gptq"):
        settings = {"quant_method": method, "bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(
            InfraError, match=rf"is {method}, which transformers can't leave on disk.*offload_device: cpu"
        ):
            captured(tmp_path)


def test_a_shard_that_is_missing_cut_short_or_of_another_shape_is_told(folders, tmp_path):
    def copy(name, change):
        folder = tmp_path / name
        folder.mkdir()
        for file in folders("tied").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder / "model.safetensors")
        return folder

    def reshaped(file):
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(8, 8, dtype=torch.bfloat16)
        save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(AnomalyError, match=r"missing holds no weights"):
        captured(copy("missing", lambda file: file.unlink()))
    with pytest.raises(AnomalyError, match=r"is cut short"):
        captured(copy("short", lambda file: file.write_bytes(file.read_bytes()[:-100])))
    with pytest.raises(AnomalyError, match=r"up_proj.weight is \[8, 8\], the model's is \[64, 32\]"):
        captured(copy("reshaped", reshaped))


def test_a_full_disk_under_hidden_states_is_told_and_leaves_nothing(folders, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    folder = folders("llama")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InfraError, match=r"hidden states .* don't fit in .*; set TMPDIR"):
            captured(folder, held=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.glob("qsa-*")) == []


def test_a_model_without_blocks_is_offloaded_by_accelerate_with_a_warning(folders, monkeypatch):
    whole, _ = captured(folders("llama"), stream=False)
    monkeypatch.setattr("pytest_qsa.engine.stream.stream.blocks_of", lambda model: [])
    with pytest.warns(QsaWarning, match="LlamaForCausalLM has no list of blocks"):
        offloaded, stream = captured(folders("llama"))
    assert stream is None
    assert differing(whole, offloaded) == []


def test_one_block_computes_while_the_next_is_read(folders, monkeypatch):
    read = []
    reading = streaming.Stream._read
    monkeypatch.setattr(
        streaming.Stream, "_read", lambda self, unit: read.append((unit, self._loaded)) or reading(self, unit)
    )
    captured(folders("llama"))
    blocks = [(unit.name, loaded and loaded.name) for unit, loaded in read if ".layers." in f".{unit.name}"]
    assert ("model.layers.2", "model.layers.1") in blocks
