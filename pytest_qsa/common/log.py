"""What a run says while it lasts: the package's logger, and the progress bar of a pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("pytest_qsa")
"""Says at DEBUG what is hashed, whether a cached capture is used, why a pass starts again, and where the time goes.
`--log-cli-level=DEBUG` of pytest and `qsa -v` show it."""

Progress = Callable[[int, int], None]
"""A callback that gets the samples done and the samples in all."""


@contextmanager
def progress_bar(name: str, *, disable: bool | None = None) -> Iterator[Progress]:
    """Show a bar of samples; yield the callback that moves it: `progress(done, total)`.

    `disable`: None shows the bar on a terminal only.
    """
    from tqdm import tqdm  # only a run that shows a bar pays for the import

    with tqdm(desc=f"qsa {name}", unit="sample", leave=False, disable=disable) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total  # known only once the data is loaded
            bar.update(done - bar.n)

        yield progress
