"""Scales of a KV cache that the configuration declares: every layer with a cache needs them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from ...common import InfraError
from ..folder import NUMBER, Finding, Folder
from ..formats.format import Format
from ..tensors import Tensor
from .parts import SEVERAL_TOKENS

KEYS_OF_CACHE = re.compile(
    r"(^|\.)(k_proj|kv_proj|qkv|qkv_proj|Wqkv|W_pack|query_key_value|c_attn|kv_a_proj_with_mqa|kv_b_proj)$"
)
"""The layers whose outputs a KV cache keeps; the module that holds one is an attention."""
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
"""Those of multi-head latent attention, whose cache keeps one tensor for keys and values."""
SCALE_OF_CACHE = re.compile(
    r"\.(?:(?P<cache>k|v|kv)(_cache)?(_global)?_scale|(?P<output>[kv])_proj\.output_(quantizer\.)?scale)$"
)
NO_CACHE = re.compile(r"linear|mamba|conv|recurrent")
"""The `layer_types` of blocks that keep a state instead of a KV cache."""
OTHER_MODELS = re.compile(r"vision|visual|audio|speech|image|encoder")
"""The modules of towers and encoders, which see all tokens at once."""
BY_HEAD = "attn_head"
"""compressed-tensors' strategy of one scale for each head of keys and values, which vLLM runs by FlashAttention 3."""
CacheScale = float | tuple[float, ...]
"""The scale of a layer's keys or values, or one for each head."""
_AGAIN = "calibrate the KV cache and save the checkpoint again, or take the declaration out"


def lost_cache_scales(form: Format) -> Iterator[Finding]:
    """Yield the layers that lack scales of a KV cache that are declared.

    vLLM fills in 1.0 for both, with one warning in its log, and for one of them the other's. Where the writer writes
    none by design (`cast_cache`) and no layer has any, that is a note.
    """
    declared = form.cache_scales_by
    attentions = _attentions(form.folder) if declared else {}
    if not attentions:
        return
    found: dict[str, dict[str, Tensor]] = {module: {} for module in attentions}
    for tensor in form.folder.tensors.values():
        match = SCALE_OF_CACHE.search(tensor.name)
        module = _holder(tensor.name, attentions) if match else ""
        if match and module:
            found[module] |= dict.fromkeys(match["cache"] or match["output"], tensor)
    ends = {side: each[side].name[len(module) :] for module, each in found.items() for side in each}
    none = not any(found.values())
    if none and form.cast_cache:
        what = f"no layer has scales, though {declared}: a server runs the KV cache at 1.0, as `fp8_cast` means it"
        yield Finding(next(iter(found)), "k_scale", "", what, "calibrate the KV cache if it isn't meant so", note=True)
        return
    for module, held in found.items():
        missing = [side for side in "kv" if side not in held]
        if not missing or (held and attentions[module]):
            continue
        names = [f"{module}{ends.get(side, f'.{side}_scale')}" for side in missing]
        both = " with v_scale" if len(missing) > 1 and not attentions[module] else ""
        everywhere = ", as in every layer" if none else ""
        runs = "runs its KV cache at 1.0" if len(missing) > 1 else f"takes {next(iter(held))}_scale's value"
        what = f"missing{both}{everywhere}, though {declared}: a server {runs}"
        yield Finding(module, names[0], "", what, _AGAIN)


def scales_of_cache(folder: Folder, modules: Iterable[str]) -> dict[str, tuple[CacheScale, CacheScale]]:
    """Return the scales of keys and values that an engine takes for some of a model's attentions, from the files.

    As vLLM does where one of the two is missing, both have its value; a layer without any runs at 1.0, and is left out.

    Raises:
        InfraError: a scale is not above 0, or there are several where the configuration doesn't say one for each head.
    """
    scheme = folder.quantization.get("kv_cache_scheme")
    by_head = isinstance(scheme, dict) and scheme.get("strategy") == BY_HEAD
    found: dict[str, dict[str, Tensor]] = {}
    for tensor in folder.tensors.values():
        if match := SCALE_OF_CACHE.search(tensor.name):
            side = match["cache"] or match["output"]
            # `self_attn.k_scale`, `self_attn.k_proj.k_scale`, `self_attn.k_proj.output_scale`
            holder = re.sub(r"\.[kv]_proj$", "", tensor.name[: match.start()].removesuffix(".attn"))
            found.setdefault(_from_blocks(holder), {}).update(dict.fromkeys("kv" if side == "kv" else side, tensor))
    scales: dict[str, tuple[CacheScale, CacheScale]] = {}
    for module in modules:
        if sides := found.get(_from_blocks(module)):
            either = next(iter(sides.values()))
            key, value = (_scale(sides.get(side, either), by_head=by_head) for side in "kv")
            scales[module] = key, value
    return scales


def _from_blocks(name: str) -> str:
    """Return a name from its first number on: loaders change what stands before the blocks."""
    return re.sub(r"^\D*?(?=\d)", "", name)


def _scale(tensor: Tensor, *, by_head: bool) -> CacheScale:
    values = [float(value) for value in tensor.values().reshape(-1)]
    odd = next((value for value in values if not (math.isfinite(value) and value > 0)), None)
    if odd is not None or not values or (len(values) > 1 and not by_head):
        what = f"{odd:g}" if odd is not None else f"{len(values)} numbers"
        takes = "scales above 0" if by_head else "one scale above 0"
        raise InfraError(f"{tensor.name} is {what}, where a KV cache in FP8 takes {takes}")
    return values[0] if len(values) == 1 else tuple(values)


def lost_once(form: Format, found: Iterable[Finding]) -> Iterator[Finding]:
    """Yield findings, and of what is missing only the first: several checks notice it, and so does a cache's layer."""
    lost: set[str] = set()
    for finding in found:
        if finding.tensor not in form.folder.tensors and finding.what.startswith("missing"):
            of_cache = SCALE_OF_CACHE.search(finding.tensor)
            name = (of_cache and _holder(finding.tensor, _attentions(form.folder))) or finding.tensor
            if name in lost:
                continue
            lost.add(name)
        yield finding


def unit_cache_scales(form: Format) -> Iterator[Finding]:
    """Yield a note where every scale of a KV cache is 1.0 and the writer clamps them there."""
    parts = ("k_scale", "v_scale")
    scales = [tensors[part] for tensors in form.folder.layers.values() for part in parts if part in tensors]
    if form.unit_scales and scales and all((each.values() == 1).all() for each in scales):
        what = (
            f"1, as all {len(scales)} scales of the KV cache: the writer clamps them at 1.0, or the cache saw no data"
        )
        advice = "compare with a cache in 16 bits if its keys and values are small"
        yield Finding.at(scales[0], what, advice, note=True)


@lru_cache(maxsize=4)
def _attentions(folder: Folder) -> Mapping[str, bool]:
    """Return the modules that fill a KV cache → whether it is a latent one, of keys and values together."""
    config = folder.text_config
    types, blocks = config.get("layer_types"), config.get("num_hidden_layers")
    shared = config.get("num_kv_shared_layers")
    found: dict[str, bool] = {}
    for layer in folder.layers:
        module, _, last = layer.rpartition(".")
        if not KEYS_OF_CACHE.search(layer) or OTHER_MODELS.search(module) or SEVERAL_TOKENS.search(module):
            continue
        if "A_log" in folder.layers.get(module, ()):  # a linear attention with projections of these names
            continue
        number = NUMBER.search(module)
        index = int(number[0]) if number else 0
        if isinstance(types, list) and index < len(types) and NO_CACHE.search(str(types[index])):
            continue
        if isinstance(blocks, int) and index >= blocks - (shared if isinstance(shared, int) else 0):
            continue
        found[module] = found.get(module, False) or last in LATENT
    return found


def _holder(name: str, modules: Mapping[str, bool]) -> str:
    """Return the module among some that holds a tensor; empty for none."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
