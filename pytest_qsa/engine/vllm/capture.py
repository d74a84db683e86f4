"""What is asked of vLLM for a subject, and what is made of its answer: sites, how layers were run, and predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...captures import (
    DRAFTS,
    LOGITS,
    Capture,
    ExecutedModules,
    Execution,
    ModelProvenance,
    Request,
    Site,
    SiteKey,
    SiteNumbers,
    against_reference,
)
from ...checkpoint import open_folder
from ...common import InfraError, QsaError, Scratch, logger, phase
from ...suite import KERNELS, WEIGHTS_ONLY, NamedSubject, environment_of, unfit_for_vllm
from ..formats.format import bits_of
from ..heads import Head, head_of, scalings_of
from ..load.batches import Batch, token_ids
from ..load.outline import empty_of
from ..modules import blocks_of, layers_of, with_experts
from ..reference.reference_file import Call
from ..run.run_pass import wanted_sites
from ..stream.disk import DTYPES
from .launch import run_program
from .recorded import DrawnRows
from .worker import CAPTURE, HIDDEN, ROWS

LOGPROBS = 20
"""How many of vLLM's own logprobs of each position of one sample check the head that makes logits here."""
MOST_APART = 0.05
"""How far those may be from the logprobs made here, in nats, in the mean over a sample."""
DRAFTED = 32
"""How many tokens are written behind each sample where drafts are counted."""
SAMPLES_AT_ONCE = 16
LEAST_BUDGET = 2048
"""Tokens of a batch, unless a sample is longer or the suite says it."""
KV_BLOCK = 128
GIB = 1 << 30


def predictions_of(requests: Sequence[Request]) -> list[Request]:
    """Return the requests of what is predicted; what a head of several tokens drafts isn't."""
    return [request for request in requests if request.site == LOGITS and request.statistics - {DRAFTS}]


def check_requests(requests: Sequence[Request], *, recorded: bool) -> None:
    """Refuse what can't be measured in vLLM. `recorded`: the reference is a file.

    Raises:
        InfraError: a request asks for it; the text says what to do.
    """
    for request in requests:
        if problem := unfit_for_vllm(request, recorded=recorded):
            raise InfraError(problem)


def empty_subject(subject: NamedSubject) -> nn.Module:
    """Return the subject's model as transformers makes it, without weights: its layers, their names and schemes.

    Raises:
        QsaError: no model can be made of its configuration.
    """
    path, spec = subject.path, subject.model
    try:
        return empty_of(spec, path, as_loaded=True)
    except QsaError as error:  # the modules of a quantizer whose library isn't here
        logger.debug("%s: its layers are those of its configuration alone: %s", path, error)
        return empty_of(spec, path)


@dataclass(frozen=True)
class VllmPass:
    """What a pass in vLLM left. `hidden`: the last hidden states of each sample, [T, H]; `result`: what vLLM said.

    `logits`: in the place of these, [T, V], where the files hold no head in floats. `rows`: of each call of a site the
    rows that were drawn, of all samples, [N, C].
    """

    sites: Mapping[SiteKey, SiteNumbers]
    hidden: Sequence[Tensor]
    logits: Sequence[Tensor]
    rows: Mapping[Call, Tensor]
    result: Mapping[str, Any]
    environment: Mapping[str, str]
    dtype: torch.dtype

    def provenance(self, model: ModelProvenance) -> ModelProvenance:
        """Say what ran. `model`: what is known of it without weights."""
        first, device = self.result["attached"][0], str(self.result["device"])
        names = ("vllm", "torch", "transformers")
        return replace(
            model,
            class_name=str(first["class"]),
            dtype=str(self.dtype).removeprefix("torch."),
            device=device,
            device_class=f"vllm-{self.result['device_class']}",
            attention=str(first["attention"]),
            versions={name: self.environment[name] for name in names if name in self.environment},
        )

    def execution(self, schemes: Mapping[str, str] | None) -> Execution:
        """Say by which kernels the quantized layers ran. `schemes`: those of the checkpoint."""
        kinds: dict[str, list[str]] = {}
        fused: dict[str, str] = {}
        for rank in self.result["attached"]:
            fused |= rank["executions"]
        mapping = self.result["attached"][0]["packed"]
        for layer in schemes or ():
            ran = fused.get(layer) or fused.get(_fused_name(layer, mapping))
            if ran is not None:
                kinds.setdefault(_words(str((schemes or {})[layer]), ran), []).append(layer)
        found = {words: ExecutedModules(len(layers), layers[0]) for words, layers in kinds.items()}
        return Execution(forward=True, kinds=found)


def _fused_name(layer: str, packed: Mapping[str, Sequence[str]]) -> str:
    parent, _, last = layer.rpartition(".")
    whole = next((whole for whole, parts in packed.items() if last in parts), last)
    return f"{parent}.{whole}".lstrip(".")


def _words(scheme: str, ran: str) -> str:
    """Write how a layer ran: `W8A8 by kernels: CompressedTensorsW8A8Int8/CPUInt8ScaledMMLinearKernel`."""
    weights, inputs = bits_of(scheme)
    floats = " FP" if scheme.endswith("_fp") else ""
    if ran.startswith("Unquantized"):
        return f"float: {ran}, which the files hold as W{weights}A{inputs}{floats}"
    return f"W{weights}A{inputs}{floats} {WEIGHTS_ONLY if inputs >= 16 else KERNELS}: {ran}"


def run_in_vllm(
    subject: NamedSubject,
    model: nn.Module,
    batches: Sequence[Batch],
    requests: Sequence[Request],
    drawn: DrawnRows | None = None,
) -> VllmPass:
    """Run the samples in vLLM. `model`: `empty_subject`, whose layers the requests name. `drawn`: which rows are kept.

    Raises:
        InfraError: vLLM or what it is to run isn't there, it can't run it, or it ran it otherwise than asked.
    """
    program = subject.vllm_program
    assert program is not None
    environment = environment_of(program.python)
    samples = [row.tolist() for batch in batches for row in token_ids(batch)]
    if not samples or any(isinstance(batch, Mapping) and len(batch) > 1 for batch in batches):
        raise InfraError("vLLM runs plain windows of text: the data have more, or other things, than token ids")
    layers, blocks = with_experts(layers_of(model)), blocks_of(model)
    wanted = wanted_sites(layers, blocks, requests)
    drafts = DRAFTED if any(DRAFTS in request.statistics for request in requests) else 0
    predicts = bool(predictions_of(requests))
    own_head = predicts and _stored_head(subject, model) is None
    phase(f"vLLM {environment['vllm']} loads and runs {len(samples)} samples")
    with Scratch("qsa-vllm") as name:
        folder = Path(name)
        settings = {**_settings(subject, samples, drafts), **program.arguments}
        job = {
            "engine": settings,
            "samples": samples,
            "wanted": [[*site, sorted(map(str, each - against_reference(each)))] for site, each in wanted.items()],
            "drawn": {"sites": sorted(drawn.sites), "rows": drawn.rows} if drawn is not None else {},
            "blocks": blocks,
            "predictions": predicts,
            "logits": own_head,
            "drafts": drafts,
            "logprobs": LOGPROBS if predicts else 0,
        }
        result = run_program(program, job, folder, _variables(model, settings), subject.model.engine.timeout)
        sites = _sites(folder, wanted)
        dtype = getattr(torch, str(result["attached"][0]["dtype"]).removeprefix("torch."))
        states = [_states(folder / HIDDEN.format(index), dtype) for index in range(len(samples))] if predicts else []
        rows = _rows(folder, dtype)
    _check_ranks(result)
    hidden, logits = ([], states) if own_head else (states, [])
    return VllmPass(sites, hidden, logits, rows, result, environment, dtype)


def _settings(subject: NamedSubject, samples: Sequence[Sequence[int]], drafts: int = 0) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM()`: those of the suite, and what a capture needs.

    `drafts`: how many tokens are written behind each sample, with drafts by the checkpoint's own head; 0 for none.
    """
    spec, longest = subject.model, max(map(len, samples))
    length = spec.engine.max_model_len or longest + max(1, drafts)  # the tokens that vLLM has to make
    folder = subject.local_folder
    own = {
        "model": str(folder or subject.path),
        "dtype": spec.dtype,
        "max_model_len": length,
        "max_num_seqs": min(SAMPLES_AT_ONCE, len(samples)),
        # As many tokens as a sample has: none runs in parts.
        "max_num_batched_tokens": max(LEAST_BUDGET, length),
        "enable_chunked_prefill": spec.engine.max_num_batched_tokens is not None,
        "trust_remote_code": spec.trust_remote_code,
        "load_format": "safetensors",  # a pickle runs code
    }
    fixed = {
        "enforce_eager": True,  # hooks aren't called in a compiled graph
        "enable_prefix_caching": False,  # else tokens that were seen before don't run
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    one = not (spec.engine.tensor_parallel_size or 1) > 1 and not (spec.engine.pipeline_parallel_size or 1) > 1
    if drafts:
        own |= {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
        fixed["disable_log_stats"] = False  # else nothing is counted
    return {**own, **({"distributed_executor_backend": "uni"} if one else {}), **spec.engine.settings, **fixed}


def _variables(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return vLLM's environment variables: one process for one rank, and on a CPU room for keys and values.

    By itself vLLM would take most of a machine's memory for these.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // (
        getattr(config, "num_attention_heads", None) or 1
    )
    tokens = settings["max_num_seqs"] * (-(-int(settings["max_model_len"]) // KV_BLOCK) + 1) * KV_BLOCK
    needed = tokens * 2 * heads * size * 4 * (getattr(config, "num_hidden_layers", None) or 1)
    single = settings.get("distributed_executor_backend") == "uni"
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-needed // GIB))),
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if single else {}),
    }


def _sites(folder: Path, wanted: Mapping[SiteKey, Any]) -> dict[SiteKey, SiteNumbers]:
    """Return the numbers that all workers left: each stage of a pipeline has its own layers.

    Raises:
        InfraError: none has a site that is wanted.
    """
    found: dict[SiteKey, SiteNumbers] = {}
    for file in sorted(folder.glob(CAPTURE.format("*"))):
        found |= Capture.load(file).sites
    missing = [f"{layer} ({site})" for layer, site in wanted if (layer, site) not in found]
    if missing:
        raise InfraError(f"vLLM called no layer {missing[0]}: exclude it")
    return {site: found[site] for site in wanted}


def _rows(folder: Path, dtype: torch.dtype) -> dict[Call, Tensor]:
    """Return the rows that the workers kept: each stage of a pipeline those of its own layers."""
    found: dict[Call, Tensor] = {}
    for file in sorted(folder.glob(ROWS.format("*"))):
        with np.load(file) as arrays:
            for name in arrays.files:
                call, site, layer = name.split(" ", 2)
                found[layer, cast(Site, site), int(call)] = torch.from_numpy(arrays[name]).view(dtype)
    return found


def _states(file: Path, dtype: torch.dtype) -> Tensor:
    # Mapped, for logits may be larger than memory; the mapping outlives the file's name.
    bits = np.load(file, mmap_mode="c")
    return torch.from_numpy(bits).view(dtype if bits.itemsize == 2 else torch.float32)


def _check_ranks(result: Mapping[str, Any]) -> None:
    """Check that the ranks of a tensor-parallel group saw the same tensors where each has all of one.

    Raises:
        InfraError: they didn't.
    """
    by_site: dict[str, list[Sequence[float]]] = {}
    for rank in result["collected"]:
        for site, sums in rank["sums"].items():
            by_site.setdefault(site, []).append(sums)
    for site, every in by_site.items():
        if any(not np.allclose(each, every[0], rtol=1e-3, equal_nan=True) for each in every):
            raise InfraError(f"the ranks of vLLM's tensor parallel group have different numbers at {site}")


class ServedHead(nn.Module):
    """Makes logits of the hidden states that vLLM left, in the place of a model: [1, T] token ids → [1, T, V].

    Without a head the states are the logits, which vLLM's own head made.
    """

    lm_head: nn.Linear | None

    def __init__(
        self, head: Head | None, config: Any, samples: Sequence[Sequence[int]], states: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.config = config
        self._head = head
        self._states = {tuple(ids): each for ids, each in zip(samples, states, strict=True)}
        if head is None:
            self.lm_head = None
            return
        rows, columns = head.weight.shape
        self.lm_head = nn.Linear(columns, rows, bias=head.bias is not None, device="meta")
        self.lm_head.weight = nn.Parameter(head.weight, requires_grad=False)
        if head.bias is not None:
            self.lm_head.bias = nn.Parameter(head.bias, requires_grad=False)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head, as transformers' models do."""
        return self.lm_head

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the logits of one sample."""
        states = self._states[tuple(input_ids[0].tolist())][None]
        if self._head is None or self.lm_head is None:
            return {"logits": states}
        return {"logits": self._head.scaled(self.lm_head(states))}


def served_head(subject: NamedSubject, model: nn.Module, samples: Sequence[Sequence[int]], ran: VllmPass) -> ServedHead:
    """Return what makes the logits of a pass in vLLM, checked against vLLM's own logprobs of the first sample.

    Raises:
        InfraError: they are other logprobs.
    """
    config = getattr(model, "config", None)
    rows = [{int(token): value for token, value in row.items()} for row in ran.result["logprobs"]]
    stored = _stored_head(subject, model)
    if stored is None:
        _check_head(_apart(ran.logits[0], rows), "vLLM's own head")
        return ServedHead(None, config, samples, ran.logits)
    weight, bias = (None if each is None else _read(each, ran.dtype) for each in stored)
    assert weight is not None
    apart: dict[float, Head] = {}
    for scaling in scalings_of(model):  # which of them the model applies, its own logprobs show
        head = Head(weight, bias, scaling)
        apart[_apart(head.logits(ran.hidden[0]), rows)] = head
    _check_head(min(apart), "the head of the files")
    return ServedHead(apart[min(apart)], config, samples, ran.hidden)


def _check_head(apart: float, whose: str) -> None:
    if not apart <= MOST_APART:
        raise InfraError(
            f"{whose} makes logprobs of the last hidden states that are {apart:.3g} nats from those that vLLM told in "
            "the mean: its predictions can't be made here; serve the model, and compare them by model.served"
        )


def _apart(logits: Tensor, rows: Sequence[Mapping[int, float]]) -> float:
    """Return how far logprobs of logits [T, V] are from those that vLLM tells: mean |Δ|, in nats."""
    own = logits.float().log_softmax(-1)
    differences = [
        abs(float(own[position, token]) - value) for position, row in enumerate(rows) for token, value in row.items()
    ]
    return float(np.mean(differences)) if differences else float("nan")


def _stored_head(subject: NamedSubject, model: Any) -> tuple[Any, Any] | None:
    """Return the head's tensors in the checkpoint's files, weight and bias; None where they hold none in floats."""
    name, names = head_of(model), {id(module): name for name, module in model.named_modules()}
    inputs = names.get(id(model.get_input_embeddings()))
    stored = open_folder(subject.path, subject.model.revision).tensors
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    chosen = [f"{each}.weight" for each in ((inputs, name) if tied else (name, inputs)) if each]
    found = next((stored[each] for each in chosen if each in stored), None)
    if name is None or found is None or not DTYPES[found.dtype].is_floating_point or found.dtype.startswith("F8"):
        return None
    return found, stored.get(f"{name}.bias")


def _read(stored: Any, dtype: torch.dtype) -> Tensor:
    content = np.fromfile(stored.path, dtype=np.uint8, count=stored.stop - stored.start, offset=stored.start)
    return torch.from_numpy(content).view(DTYPES[stored.dtype]).reshape(stored.shape).to(dtype)
