"""The bar of a pass, for whoever runs one. tqdm is imported when it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(name: str, *, disable: bool | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show how many samples are done; yield what is to be told: samples done, samples in all.

    `disable`: None shows it on a terminal only.
    """
    from tqdm import tqdm

    with tqdm(desc=f"qsa {name}", unit="sample", leave=False, disable=disable) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
