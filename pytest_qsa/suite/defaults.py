"""The section `defaults`: what the assertions of a suite share, given to each that doesn't say it itself."""

from __future__ import annotations

from typing import Any

from ..common import did_you_mean
from ..metrics import METRICS
from .sections import ASSERTIONS
from .yaml_source import Location, YamlSource

DEFAULTS: Location = ("defaults",)


def apply_defaults(source: YamlSource) -> None:
    """Complete the assertions of a document: mappings key by key, `null` for none; a metric gets what it takes.

    Raises:
        SuiteError: a default that no assertion could ever have.
    """
    shared = source.data.get("defaults")
    if shared is None:
        return
    if not isinstance(shared, dict):
        raise source.error(DEFAULTS, "defaults is a mapping of keys that assertions share")
    known = {name for model in ASSERTIONS.values() for name in model.model_fields} - {"id"}
    for key in shared:
        if key not in known:
            raise source.error((*DEFAULTS, str(key)), f"unknown key '{key}'{did_you_mean(str(key), known)}")
    for index, entry in enumerate(source.data.get("assertions") or ()):
        for key, value in shared.items():
            if _takes({**shared, **entry}, key):
                _complete(source, entry, key, value, ("assertions", index, key), (*DEFAULTS, key))


def _takes(entry: dict[str, Any], key: str) -> bool:
    """Say whether a key means something to an assertion's metric; a wrong metric is told later, by itself."""
    name = str(entry.get("metric"))
    if name in ASSERTIONS and key not in ASSERTIONS[name].model_fields:
        return False
    metric = METRICS.get(name)
    if metric is not None and key == "positions":
        return metric.positional and entry.get("site", metric.sites[0]) != "weight"
    return metric is None or key != "reduce" or metric.reduce is not None


def _complete(source: YamlSource, entry: Any, key: Any, default: Any, to: Location, at: Location) -> None:
    if key not in entry:
        entry[key] = default
        inner = {place[len(at) :]: where for place, where in source.places.items() if place[: len(at)] == at}
        source.places |= {(*to, *rest): where for rest, where in inner.items()}
    elif entry[key] is None:
        del entry[key]
    elif isinstance(entry[key], dict) and isinstance(default, dict):
        for name, value in default.items():
            _complete(source, entry[key], name, value, (*to, str(name)), (*at, str(name)))
