"""How many threads the kernels run on: as many as torch, whose number is left as it is."""

from __future__ import annotations

import torch
from numba import config, set_num_threads


def share_torchs_threads() -> int:
    """Let the kernels that this thread calls next run on as many threads as torch has; return how many.

    More would wait in the way of what torch does. To start numba's may set the number of torch's: on one OpenMP runtime
    it is the same.
    """
    before = torch.get_num_threads()
    count = min(before, config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    set_num_threads(count)
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
    return int(count)
