"""The file of a baseline, and what may be compared with it. Small, sorted, rounded text: its diff is reviewed.

`qsa diff` reads baselines without pytest, which syrupy's extension in baselines.py needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..captures import GENERATED, UNKNOWN_MODEL, ModelProvenance
from ..checkpoint import EXPERT
from ..common import BaselineError, content_hash, counted, parsed_json, refuse_special, remark, shown_path
from ..metrics import LOSSLESS, MOST_RELATIVE, Bounds, Series

BASELINES = "qsa_baselines"
MOST_BYTES = 250_000_000
"""The largest baseline that is read."""
BASELINE_FORMAT = "qsa-baseline/1"
BASELINE_DIGITS = 5
EDITED = "the baseline was edited by hand or merged since it was written (its key `content` doesn't fit)"
EXPERTS_SINCE = "0.1.0"
"""The version since which the experts of a packed tensor are layers with a weight."""


@dataclass(frozen=True)
class BaselineFile:
    """A baseline. `query`: all that defines the number. `data`: the hash of the tokens. `made_with`: the model.

    `edited`: the file states the hash of another content.
    """

    values: Mapping[str, float]
    query: Mapping[str, Any]
    data: str | None
    made_with: ModelProvenance = UNKNOWN_MODEL
    edited: bool = False

    @classmethod
    def of(cls, series: Series, data: str | None, made_with: ModelProvenance = UNKNOWN_MODEL) -> BaselineFile:
        """Make the baseline of a series."""
        query = series.query
        asked = {
            "definition": query.definition, "site": query.site, "positions": query.positions, "reduce": query.reduce,
            "over": query.over, **query.parameters,
        }  # fmt: skip
        values = {layer: rounded(value) for layer, value in zip(series.layers, series.values.tolist(), strict=True)}
        return cls(values, {k: v for k, v in asked.items() if v is not None}, data, made_with)

    def dump(self) -> str:
        """Return the text: sorted keys, and the layers in the model's order, one a line."""
        content: dict[str, Any] = {
            "data": self.data,
            "format": BASELINE_FORMAT,
            "made_with": dict(sorted(self.made_with.for_baseline().items())),
            "query": dict(sorted(self.query.items())),
            "values": {layer: _written(value) for layer, value in self.values.items()},
        }
        # The last key, so that a baseline of an earlier version differs in one line.
        content["content"] = _hash_of(content)
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, text: str) -> BaselineFile:
        """Read the text.

        Raises:
            BaselineError: it is not a baseline of this format; it holds the marks of a merge conflict, say.
        """
        try:
            content = parsed_json(text)
            if content["format"] != BASELINE_FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {BASELINE_FORMAT!r}")
            # Other metrics may be 300 and mean it.
            read = _decibels if content["query"].get("definition") == "quantization_sqnr/1" else float
            values = {layer: read(value) for layer, value in content["values"].items()}
            made_with = ModelProvenance.of_baseline(content["made_with"])
            edited = content.get("content", own := _hash_of(content)) != own
            return cls(values, content["query"], content["data"], made_with, edited)
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
            raise BaselineError(f"the baseline can't be read ({error}); make it anew with --snapshot-update") from None


def _hash_of(content: Mapping[str, Any]) -> str:
    """Return the hash of what is compared; `made_with` is for the reader."""
    return content_hash({key: content[key] for key in ("query", "data", "values")})


def read_baseline(path: Path) -> BaselineFile:
    """Read a baseline; a remark says so where its numbers aren't those that were written.

    Raises:
        OSError: it can't be read; `FileNotFoundError` where there is none.
        BaselineError: it is not a baseline of this format.
        InfraError: it is no regular file, or too large.
    """
    refuse_special(path, MOST_BYTES)
    baseline = BaselineFile.parse(path.read_bytes().decode("utf-8", "replace"))
    if baseline.edited:
        remark(f"{shown_path(path)}: {EDITED}; if that was meant, --snapshot-update accepts it")
    return baseline


def baseline_hashes(folder: Path) -> dict[str, str]:
    """Return the hash of the content of each baseline of a folder, by its file's name; of no other file in it."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        if is_baseline(file):
            try:
                found[file.name] = _hash_of(parsed_json(file.read_bytes()))
            except (ValueError, KeyError, TypeError):
                found[file.name] = "unreadable"
    return found


def baseline_folder(suite: Path, model: str) -> Path:
    """Return where the baselines of a suite (or a Python test file) lie for a model."""
    stem = suite.name.removesuffix(".yaml").removesuffix(".yml").removesuffix(".py").removesuffix(".qsa")
    return suite.parent / BASELINES / model / stem


def readable(path: Path) -> bool:
    """Say whether a path leads to a regular file, no device for instance, that isn't too large for a baseline."""
    return path.is_file() and path.stat().st_size <= MOST_BYTES


def is_baseline(path: Path) -> bool:
    """Say by its content whether a file is a baseline: syrupy deletes unused ones, and must delete no other file."""
    if path.suffix != ".json" or not readable(path):
        return False
    try:
        # By a search, not by parsing: one with the marks of a merge conflict is still a baseline.
        return f'"format": "{BASELINE_FORMAT.partition("/")[0]}/' in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _decibels(value: Any) -> float:
    """Read an SQNR; 300 stands for +∞ in older baselines."""
    return math.inf if float(value) == LOSSLESS else float(value)


def _written(value: float) -> int | float | str:
    """Return a number as JSON has it: whole ones without a point, an SQNR of +∞ dB as a string, as in report.json."""
    if not math.isfinite(value):
        return str(value).replace("inf", "Infinity")
    # Larger whole numbers would show digits that a float64 does not hold.
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def rounded(value: float) -> float:
    """Round to the digits that a baseline keeps."""
    return float(f"{value:.{BASELINE_DIGITS}g}")


@dataclass(frozen=True)
class Tolerance:
    """The allowed distance from a baseline: max(abs, rel·|baseline|). `up` and `down` forbid one direction only."""

    rel: float = 0.0
    abs: float = 0.0
    direction: str = "both"

    def __post_init__(self) -> None:
        if self.direction not in ("both", "up", "down"):
            raise ValueError(f"direction '{self.direction}': one of both, up, down")
        if not (self.rel >= 0 and self.abs >= 0):
            raise ValueError(f"rel={self.rel:g}, abs={self.abs:g}: a tolerance is 0 or more")
        if self.rel > MOST_RELATIVE or not math.isfinite(self.abs):
            raise ValueError(
                f"rel={self.rel:g}, abs={self.abs:g}: with a tolerance above {MOST_RELATIVE:.0%} of the baseline, or "
                "without end, nothing would be checked"
            )

    def bounds(self, baseline: float) -> Bounds:
        """Return the bounds of a layer with this baseline; no finite value is near an infinite one."""
        if math.isinf(baseline):
            return Bounds(None if self.direction == "up" else baseline, None if self.direction == "down" else baseline)
        allowed = max(self.abs, self.rel * abs(baseline))
        low = None if self.direction == "up" else baseline - allowed
        high = None if self.direction == "down" else baseline + allowed
        return Bounds(low, high)

    def __str__(self) -> str:
        """Write it as a suite does: `baseline ± 5 %`."""
        parts = [f"{self.rel * 100:.3g} %"] if self.rel else []
        parts += [f"{self.abs:g}"] if self.abs or not self.rel else []
        sign = {"both": "±", "up": "+", "down": "−"}[self.direction]
        return f"baseline {sign} {' or '.join(parts)}"


def check_comparable(series: Series, baseline: BaselineFile, data: str | None) -> None:
    """Check that a baseline is of the same definition, tokens and layers as a series.

    Raises:
        BaselineError: it is not; the text says what differs.
    """
    now = BaselineFile.of(series, data)
    if now.query != baseline.query:
        changed = [
            key for key in sorted({*now.query, *baseline.query}) if now.query.get(key) != baseline.query.get(key)
        ]
        first = changed[0]
        raise BaselineError(
            f"the baseline was made with another {first}: {baseline.query.get(first)!r}, now {now.query.get(first)!r}, "
            "so the numbers can't be compared"
        )
    # Weights are the same on any tokens.
    if baseline.data != now.data and series.query.metric == GENERATED.name:
        raise BaselineError(
            f"the baseline has answers to other prompts ({_shortened(baseline.data)}, now {_shortened(now.data)}): "
            "generation.prompts, num_prompts or max_new_tokens changed, so the numbers can't be compared"
        )
    if baseline.data != now.data and series.query.site != "weight":
        raise BaselineError(
            f"the baseline was made on other tokens ({_shortened(baseline.data)}, now {_shortened(now.data)}): data, "
            "tokenizer, seed, num_samples or seq_len changed, so the numbers can't be compared"
        )
    _check_layers(series, baseline)


def _check_layers(series: Series, baseline: BaselineFile) -> None:
    own = set(series.layers)
    gone = [layer for layer in baseline.values if layer not in own]
    new = [layer for layer in series.layers if layer not in baseline.values]
    if gone or new:
        parts = [f"{len(names)} {word} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})" for word, names in
                 (("vanished", gone), ("appeared", new)) if names]  # fmt: skip
        text = f"the layers differ from the baseline's: {'; '.join(parts)}"
        if new and not gone and all(map(EXPERT.search, new)):
            text = (
                f"the baseline is older than pytest-qsa {EXPERTS_SINCE}, since which packed experts have weights of "
                f"their own: {counted(len(new), 'layer')} of experts ({new[0]}, …) are none of its "
                f"{len(baseline.values)}; look at their numbers and accept them with --snapshot-update, or leave them "
                r"out by exclude: experts\.\d+\."
            )
        raise BaselineError(text)


def _shortened(fingerprint: str | None) -> str:
    return (fingerprint or "none").removeprefix("sha256:")[:12]
