"""Every metric as a method, from the registry. `make generate` writes methods.pyi, which tells editors and mypy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from ..common import did_you_mean
from .registry import METRICS


class MetricMethods:
    """The methods of a selection: a metric's own parameters, then `reduce` and `positions` where it has them."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # copy, pickle and doctest ask for dunder names that aren't there; these must not load entry points.
        metric = None if name.startswith("_") else METRICS.find(name)
        if metric is None:
            raise AttributeError(f"there is no metric '{name}'{did_you_mean(name, METRICS)}")

        def method(*values: Any, **named: Any) -> Any:
            arguments = metric.signature.bind(*values, **named).arguments
            reduce, positions = arguments.pop("reduce", None), arguments.pop("positions", None)
            own = {key: _as_declared(metric.parameters[key].annotation, value) for key, value in arguments.items()}
            return self.series(name, reduce, positions, **own)

        method.__name__, method.__doc__ = name, metric.compute.__doc__
        return method


def _as_declared(annotation: Any, value: Any) -> Any:
    """Return a whole number as a float where the parameter is one, so that 64 and 64.0 are the same query."""
    is_float = annotation is float or get_args(annotation)[:1] == (float,)
    return float(value) if is_float and isinstance(value, int) else value
