"""The progress bar of a pass. tqdm is imported only when one is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]
"""A callback that gets the samples done and the samples in all."""


@contextmanager
def progress_bar(name: str, *, disable: bool | None = None) -> Iterator[Progress]:
    """Show a bar of samples; yield the callback that moves it: `progress(done, total)`.

    `disable`: None shows the bar on a terminal only.
    """
    from tqdm import tqdm

    with tqdm(desc=f"qsa {name}", unit="sample", leave=False, disable=disable) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
