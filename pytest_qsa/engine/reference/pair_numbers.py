"""What was compared at each site, joined with what was reduced there of the model alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ...captures import LAYOUTS, SiteNumbers, Statistic
from ...common import InfraError
from ..reduce.storage import Transfer

if TYPE_CHECKING:
    from ...captures import SiteKey
    from .compare import PairObserver


def joined(
    numbers: Mapping[SiteKey, SiteNumbers],
    observers: Mapping[SiteKey, PairObserver],
    wanted: Mapping[SiteKey, frozenset[Statistic]],
) -> dict[SiteKey, SiteNumbers]:
    """Return the numbers of every site, with those of two models where they were wanted."""
    known: dict[tuple[Any, ...], SiteNumbers] = {}
    found = dict(numbers)
    kept = (value for observer in observers.values() for row in observer.rows for value in row.values())
    fetch = Transfer(value for value in kept if isinstance(value, Tensor))
    for site, statistics in wanted.items():
        observer = observers.get(site)
        if observer is None:
            found[site] = numbers[site].having(statistics, {})
            continue
        key = (id(numbers[site]), statistics, *(id(row) for row in observer.rows))
        if key not in known:
            known[key] = _joined(numbers[site], observer, statistics, site, fetch)
        found[site] = known[key]
    return found


def _joined(
    own: SiteNumbers, observer: PairObserver, statistics: frozenset[Statistic], site: SiteKey, fetch: Transfer
) -> SiteNumbers:
    owners = np.array(observer.owners, dtype=np.int64).reshape(-1, 3)
    order = np.lexsort((owners[:, 1], owners[:, 0]))
    owners, rows = owners[order], [observer.rows[index] for index in order]
    placed: dict[str, Any] = {
        "sample": owners[:, 0].astype(np.int32), "call": owners[:, 1].astype(np.int32), "lengths": owners[:, 2],
    }  # fmt: skip
    if own.populations:
        if any(not np.array_equal(getattr(own, name), array) for name, array in placed.items()):
            raise InfraError(f"the {site[1]} of {site[0]} was compared in other calls than it was measured in")
    else:
        own = replace(own, dtype=observer.dtype, shape=observer.shape, token_axis=observer.token_axis, **placed)
    values = {name: [fetch(row[name]) for row in rows] for name in rows[0]}
    arrays = {name: LAYOUTS[name.partition("/")[0]].join(found) for name, found in values.items()}
    return own.having(statistics, arrays)
