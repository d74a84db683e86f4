"""Data sets by name: where they are on the hub, how windows are drawn from them, and their copies in the cache.

It imports nothing heavy, because the fingerprint reads the copies as well, without the loader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .sections import Data

DOCUMENTS = 10_000
"""How many documents of a set are read: the first ones, so that streaming and a copy in the cache give the same."""

Rule = Literal["packed", "stream", "document"]
"""How windows are drawn. `packed`: the texts are joined and cut into windows, of which the seed chooses. `stream`: at
random offsets of the joined texts. `document`: at a random offset of a random text that is long enough."""


@dataclass(frozen=True)
class HubSet:
    """A set of the hub. `large`: it is streamed unless a copy lies in the cache.

    `column`: None for `text`, or `messages` of conversations.
    """

    repository: str
    subset: str | None = None
    split: str = "train"
    column: str | None = None
    rule: Rule = "packed"
    large: bool = True
    data_files: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository} ({', '.join(filter(None, (self.subset, f'split {self.split}')))})"

    @property
    def files(self) -> dict[str, str] | None:
        """The `data_files` argument of `load_dataset`; a cached copy is found only by the same argument."""
        return {self.split: self.data_files} if self.data_files else None

    @property
    def fetch(self) -> str:
        """The command that downloads a copy into the cache."""
        words = [repr(self.repository), *([repr(self.subset)] if self.subset else [])]
        words += [f"data_files={self.files!r}"] if self.files else []
        words += [f"revision={self.revision!r}"] if self.revision else []
        return f'python -c "import datasets; datasets.load_dataset({", ".join([*words, f"split={self.split!r}"])})"'

    @property
    def copies(self) -> list[Path]:
        """The files of the copies in the cache; streaming leaves none."""
        # As `datasets` names the folder of a repository.
        folder = cache_folder() / self.repository.replace("/", "___")
        return sorted(file for file in folder.rglob("*") if file.suffix == ".arrow")


BUILTIN: Mapping[str, HubSet] = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", column="text", rule="stream", large=False),
    "pile": HubSet("mit-han-lab/pile-val-backup", split="validation", column="text", rule="document"),
    "c4": HubSet("allenai/c4", column="text", rule="document", data_files="en/c4-train.00000-of-01024.json.gz"),
    "redpajama": HubSet(
        "togethercomputer/RedPajama-Data-1T-Sample", column="text", rule="document", revision="refs/convert/parquet"
    ),
}  # fmt: skip
"""The calibration sets of PrefixQuant (arXiv 2410.05265) and SmoothQuant (2211.10438), with PrefixQuant's rules."""


def hub_set_of(data: Data) -> HubSet | None:
    """Return the set that a source names, `hf:NAME[:subset]` or a built-in one; None for another kind of source."""
    found = BUILTIN.get(data.source)
    # Any folder does for `local_path` here: only whether the source is local matters.
    if found is None and data.source.startswith("hf:") and local_path(data, Path()) is None:
        name, _, subset = data.source.removeprefix("hf:").partition(":")
        found = HubSet(name, subset or None) if name else None
    if found is None:
        return None
    return replace(
        found,
        subset=data.subset or found.subset,
        split=data.split or found.split,
        column=data.column or found.column,
        revision=data.revision or found.revision,
    )


def local_path(data: Data, folder: Path) -> Path | None:
    """Return the file or folder that `custom:PATH` names, or `hf:./PATH`; None for another kind of source."""
    kind, _, rest = data.source.partition(":")
    local = rest and (kind == "custom" or (kind == "hf" and rest.startswith((".", "/", "~"))))
    return folder / Path(rest).expanduser() if local else None


def cache_folder() -> Path:
    """Return the cache folder of the library `datasets`."""
    # The order in which `datasets` itself looks; to import it would take longer than all else here.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets").expanduser()
