"""Does a gate fail a healthy checkpoint that was only quantized again? It should not.

Of SmolLM2, in int8 (a scale a row) and in W4A16 (a scale for 64 inputs), twenty checkpoints each are made: rounded in
eight ways, by GPTQ and by AWQ with four texts for calibration each, and four times written again by other tools. `qsa
init` writes a suite of the plainest one, and one of the first by AWQ, which folds scales into norms; every other one is
held against the suite of its kind. A line of JSON a checkpoint is appended to the file, so that a later start goes on
where an earlier one ended.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from common import SMOLLM2, smollm2
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Rounding = Callable[[Tensor, "Scheme"], tuple[Tensor, Tensor]]
"""A weight [out, in] → its codes [out, in] and its scales [out, groups]."""
Hessians = Mapping[str, Tensor]
"""A layer → Σ x·xᵀ of its inputs, [in, in]."""
INT8 = SMOLLM2.parent / "smollm2-int8"
DONE = ".made"
"""A file that a checkpoint gets when it is whole: 0.2 GB each are kept."""
TOKENS, WINDOW = 5120, 512
"""The tokens of a text for calibration, and those of a sample."""
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Scheme:
    """How weights are stored. `group`: the inputs that share a scale, 0 for all of a row."""

    name: Literal["int8", "w4a16"]
    bits: int
    group: int

    @property
    def most(self) -> int:
        """The number of negative codes."""
        return 1 << (self.bits - 1)

    def grouped(self, weight: Tensor) -> Tensor:
        """Return [out, groups, group]."""
        return weight.reshape(len(weight), -1, self.group or weight.shape[1])

    def scales(self, weight: Tensor, clip: float = 1.0) -> Tensor:
        """Return [out, groups]: the largest |w| over half of the codes' range, as compressed-tensors takes it."""
        return self.grouped(weight).abs().amax(2).clamp(min=1e-9) * clip / (self.most - 0.5)

    def spread(self, scales: Tensor, weight: Tensor) -> Tensor:
        """Return a scale for each weight [out, in]."""
        return scales.repeat_interleave(self.group or weight.shape[1], 1)

    def codes(self, scaled: Tensor) -> Tensor:
        """Return whole numbers within the range."""
        return scaled.round().clamp(-self.most, self.most - 1)

    def stored(self, layer: str, codes: Tensor, scales: Tensor) -> Tensors:
        """Return the tensors of a layer in compressed-tensors' layout."""
        if self.bits == 8:
            return {f"{layer}.weight": codes.to(torch.int8), f"{layer}.weight_scale": scales}
        packed = pack_to_int32(codes.to(torch.int8), self.bits)
        shape = torch.tensor(codes.shape)
        return {f"{layer}.weight_packed": packed, f"{layer}.weight_scale": scales, f"{layer}.weight_shape": shape}

    @property
    def declared(self) -> dict[str, Any]:
        """The `quantization_config`."""
        stated: dict[str, Any] = json.loads((INT8 / "config.json").read_text())["quantization_config"]
        if self.bits == 8:
            return stated
        group = stated["config_groups"]["group_0"]
        group |= {"format": "pack-quantized", "input_activations": None}
        group["weights"] |= {"num_bits": self.bits, "strategy": "group", "group_size": self.group}
        return {**stated, "format": "pack-quantized"}


SCHEMES = (Scheme("int8", 8, 0), Scheme("w4a16", 4, 64))


# --- eight ways to round


def nearest(weight: Tensor, scheme: Scheme, *, clip: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Round to the nearest code. `clip`: of the largest |w|; `dtype`: of the scales."""
    scales = scheme.scales(weight, clip).to(dtype)
    return scheme.codes(weight / scheme.spread(scales.float(), weight)), scales


def symmetric(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Let the largest |w| be the largest code, so that the least code is never used."""
    return nearest(weight, scheme, clip=(scheme.most - 0.5) / (scheme.most - 1))  # type: ignore[no-any-return]


def least_error(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Search the clip with the least squared error for each group, as an `mse` observer does."""
    best, least = scheme.scales(weight), torch.full(scheme.grouped(weight).shape[:2], torch.inf)
    for clip in torch.linspace(0.7, 1.0, 16).tolist():
        scales = scheme.scales(weight, clip).bfloat16().float()
        spread = scheme.spread(scales, weight)
        error = scheme.grouped((scheme.codes(weight / spread) * spread - weight) ** 2).sum(2)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return scheme.codes(weight / scheme.spread(best, weight)), best.bfloat16()


def stochastic(weight: Tensor, scheme: Scheme, *, seed: int) -> tuple[Tensor, Tensor]:
    """Round up or down by chance, so that the mean is the weight: 3 dB more noise than the nearest code."""
    chance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    scales = scheme.scales(weight).bfloat16()
    return scheme.codes((weight / scheme.spread(scales.float(), weight) + chance).floor()), scales


ROUNDINGS: Mapping[str, Rounding] = {
    "nearest": nearest,
    "clip 0.97": partial(nearest, clip=0.97),
    "clip 0.99": partial(nearest, clip=0.99),
    "least squared error": least_error,
    "no least code": symmetric,
    "scales in float32": partial(nearest, dtype=torch.float32),
    "by chance, seed 0": partial(stochastic, seed=0),
    "by chance, seed 1": partial(stochastic, seed=1),
}


# --- GPTQ and AWQ


def hessians(part: int) -> Hessians:
    """Run a part of the shipped text through SmolLM2; layers that read the same tensor share a matrix."""
    from common import token_batches

    model = smollm2(torch.float32).eval()
    found: dict[str, Tensor] = {}
    last: dict[str, Any] = {}

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2)
        if last.get("inputs") is not args[0]:
            last.update(inputs=args[0], sum=inputs.T @ inputs)
        found[name] = found[name] + last["sum"] if name in found else last["sum"]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(partial(add, name))
    count = TOKENS // WINDOW
    for batch in token_batches(count * (part + 1), WINDOW)[count * part :]:
        model(batch)
    return found


def gptq(weight: Tensor, scheme: Scheme, hessian: Tensor, *, block: int = 64) -> tuple[Tensor, Tensor]:
    """Round column after column, and correct those that follow for the error (Frantar et al., arXiv 2210.17323)."""
    weight, columns = weight.clone(), weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    scales = scheme.scales(weight).bfloat16()
    codes = torch.empty_like(weight)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if scheme.group and start % scheme.group == 0:  # of what the columns before have made of these
            scales[:, start // scheme.group] = scheme.scales(weight[:, start : start + scheme.group])[:, 0].bfloat16()
        errors = torch.zeros(len(weight), end - start)
        for column in range(start, end):
            scale = scales[:, column // scheme.group if scheme.group else 0].float()
            codes[:, column] = scheme.codes(weight[:, column] / scale)
            error = (weight[:, column] - codes[:, column] * scale) / inverse[column, column]
            weight[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return codes, scales


def smoothed(tensors: Tensors, scheme: Scheme, sums: Hessians) -> Tensors:
    """Fold scales of channels into norms and up_proj, those of the least error (AWQ, arXiv 2306.00978)."""
    changed = dict(tensors)
    for index in range(30):
        block = f"model.layers.{index}"
        for norm, readers in READERS.items():
            layers = [f"{block}.{reader}" for reader in readers]
            factors = _awq_scales([changed[f"{layer}.weight"] for layer in layers], scheme, sums[layers[0]])
            changed[f"{block}.{norm}.weight"] = changed[f"{block}.{norm}.weight"] / factors
            changed |= {f"{layer}.weight": changed[f"{layer}.weight"] * factors for layer in layers}
        down, up = (f"{block}.mlp.{name}_proj.weight" for name in ("down", "up"))
        factors = _awq_scales([changed[down]], scheme, sums[down.removesuffix(".weight")])
        changed |= {down: changed[down] * factors, up: changed[up] / factors[:, None]}
    return changed


def _awq_scales(weights: list[Tensor], scheme: Scheme, hessian: Tensor) -> Tensor:
    sizes = hessian.diagonal().sqrt()
    best, least = torch.ones(len(sizes)), torch.inf
    for power in torch.linspace(0, 0.9, 10).tolist():
        factors = (sizes / sizes.mean()).clamp(min=1e-4) ** power
        factors = factors / (factors.max() * factors.min()).sqrt()
        error = 0.0
        for weight in weights:
            codes, scales = nearest(weight * factors, scheme)
            apart = codes * scheme.spread(scales.float(), weight) / factors - weight
            error += float(((apart @ hessian) * apart).sum())
        if error < least:
            best, least = factors, error
    return best


# --- checkpoints


def write(folder: Path, scheme: Scheme, tensors: Tensors, quantize: Callable[[str, Tensor], Any]) -> None:
    """Write a checkpoint of tensors in float32, of which `quantize` makes codes and scales."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj"):
            stored |= scheme.stored(layer, *quantize(layer, tensor))
        else:
            stored[name] = tensor.bfloat16()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SMOLLM2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": scheme.declared}, indent=2))


def original() -> Tensors:
    """Return SmolLM2's tensors in float32."""
    return {name: tensor.float() for name, tensor in load_file(SMOLLM2 / "model.safetensors").items()}


def resharded(folder: Path) -> None:
    """Cut the file into three shards, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = list(tensors), dict[str, str]()
    for part in range(3):
        file = f"model-{part + 1:05}-of-00003.safetensors"
        own = names[part::3]
        save_file({name: tensors[name] for name in own}, folder / file)
        index |= dict.fromkeys(own, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def wider(folder: Path) -> None:
    """Store scales and norms in float32."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: t.float() if name.endswith(("_scale", "norm.weight")) else t for name, t in tensors.items()}
    save_file(changed, folder / "model.safetensors")


def older(folder: Path) -> None:
    """Write config.json and the tokenizer's merges as versions of 2024 did."""
    settings = json.loads((folder / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": settings.pop("dtype")}
    settings["quantization_config"] |= {"version": "0.9.4"}
    settings["quantization_config"].pop("transform_config")
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def head_too(folder: Path) -> None:
    """Write the tied head as well, and the rope's buffers as older transformers did."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    turns = 1 / 1e5 ** (torch.arange(0, 64, 2) / 64)
    tensors |= {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": turns.clone() for index in range(30)}
    save_file(tensors, folder / "model.safetensors")


REWRITTEN = {"three shards": resharded, "float32": wider, "older versions": older, "tied head": head_too}


@dataclass(frozen=True)
class Case:
    """A checkpoint. `kind`: what its suite is of; `make` writes it into a folder."""

    kind: str
    name: str
    make: Callable[[Path], None]


def cases(scheme: Scheme, work: Path) -> Iterator[Case]:
    """Yield the checkpoints of a scheme; the first of its kind is the one that the suite is of."""
    for name, rounding in ROUNDINGS.items():
        yield Case("rounded", name, lambda folder, own=rounding: write(  # type: ignore[misc]
            folder, scheme, original(), lambda _, weight: own(weight, scheme)
        ))  # fmt: skip
    for part in range(4):
        yield Case("GPTQ", f"GPTQ, text {part}", partial(by_gptq, scheme, work, part))
    for name, change in REWRITTEN.items():
        yield Case("rounded", f"written again: {name}", partial(again, scheme, change))
    for part in range(4):
        yield Case("AWQ", f"AWQ, text {part}", partial(by_awq, scheme, work, part))


def by_gptq(scheme: Scheme, work: Path, part: int, folder: Path) -> None:
    """Write a checkpoint by GPTQ."""
    sums = kept_hessians(work, part)
    write(folder, scheme, original(), lambda layer, weight: gptq(weight, scheme, sums[layer]))
    (folder / "recipe.yaml").write_text("default_stage: {default_modifiers: {GPTQModifier: {targets: [Linear]}}}\n")


def by_awq(scheme: Scheme, work: Path, part: int, folder: Path) -> None:
    """Write a checkpoint by AWQ."""
    tensors = smoothed(original(), scheme, kept_hessians(work, part))
    write(folder, scheme, tensors, lambda _, weight: nearest(weight, scheme))


def again(scheme: Scheme, change: Callable[[Path], None], folder: Path) -> None:
    """Write the plainest checkpoint, and change its files."""
    write(folder, scheme, original(), lambda _, weight: nearest(weight, scheme))
    change(folder)


def kept_hessians(work: Path, part: int) -> Hessians:
    """Return the matrices of a text, which both schemes use."""
    file = work / f"hessians-{part}.safetensors"
    if not file.exists():
        save_file({name: tensor.contiguous().clone() for name, tensor in hessians(part).items()}, file)
    return load_file(file)


# --- the gate


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module of this environment."""
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, check=False)


def suite_of(scheme: Scheme, kind: str, folder: Path, work: Path) -> Path:
    """Return the suite of a kind, by `qsa init` on its first checkpoint, with its baselines."""
    suite = work / f"{scheme.name}-{kind}.qsa.yaml"
    if not suite.exists():
        size = ("--data.num_samples", "8", "--data.seq_len", "256")
        made = command("pytest_qsa", "init", folder, "--reference", SMOLLM2, "-o", suite, "--no-answers", *size)
        if made.returncode:
            sys.exit(made.stdout + made.stderr)
        options = ("-q", "--snapshot-update", "--qsa-output", work / "out", "-p", "no:cacheprovider")
        made = command("pytest", suite, *options)
        if made.returncode:
            suite.unlink()
            sys.exit(made.stdout + made.stderr)
    return suite


def judged(suite: Path, folder: Path, work: Path) -> list[str]:
    """Return the first line of each assertion that isn't green."""
    report = work / "out" / "report.json"
    report.unlink(missing_ok=True)
    ran = command(
        "pytest", suite, "-q", "-p", "no:cacheprovider", f"--qsa-output={work / 'out'}", f"--qsa-model={folder}"
    )
    if not ran.returncode:
        return []
    if not report.exists():
        return [ran.stdout[-2000:] + ran.stderr[-2000:]]
    results = json.loads(report.read_text())["results"]
    return [f"{each['id']}: {each['headline']}" for each in results if each["kind"] not in ("PASSED", "WARNED")]


def main() -> None:
    """Make, judge, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, default=Path("build/requantizations"), help="keeps suites, and the file")
    parser.add_argument("--only", default="", help="checkpoints whose name begins so")
    parser.add_argument("--scheme", choices=[scheme.name for scheme in SCHEMES], help="default: both")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    file = work / "judged.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["scheme"], row["name"]) for row in rows}
    for scheme in [each for each in SCHEMES if options.scheme in (None, each.name)]:
        for case in cases(scheme, work):
            first = case.name in ("nearest", "GPTQ, text 0", "AWQ, text 0")
            wanted = case.name.startswith(options.only) or (first and options.only.startswith(case.kind))
            if (scheme.name, case.name) in done or not wanted:
                continue
            folder = work / "made" / re.sub(r"\W+", "-", f"{scheme.name} {case.name}")
            if not (folder / DONE).exists():
                case.make(folder)
                (folder / DONE).touch()
            found = judged(suite_of(scheme, case.kind, folder, work), folder, work)
            rows.append({"scheme": scheme.name, "kind": case.kind, "name": case.name, "red": found})
            with file.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            print(f"{scheme.name:<6} {case.name:<32} {'; '.join(found) or 'green'}", flush=True)
    green = sum(not row["red"] for row in rows)
    print(f"{green} of {len(rows)} healthy checkpoints are green")


if __name__ == "__main__":
    main()
