"""All that an analysis leaves in its folder: pictures, tables, the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...captures import Capture
from ...common import write_atomically
from ...report import Gallery, Shown, Turning, render_gallery, surface_data
from ...suite import Subject, Visualization
from .draw import Drawn, draw_picture, maps_of
from .export import as_csv, as_json, as_parquet, rows_of
from .pictures import Analysis

HEADINGS = {
    "magnitude_input": "Magnitudes of inputs", "magnitude_output": "Magnitudes of outputs",
    "magnitude_weight": "Magnitudes of weights", "outlier_layer_wise": "Outlier tokens by layer",
    "outlier_position": "Outlier tokens by position", "outlier_token": "Outlier tokens by text",
    "distribution": "Distributions", "percentile_range": "Percentiles by channel", "heatmap_3d": "Heat maps",
}  # fmt: skip
TABLES = ("csv", "json", "parquet")


@dataclass
class Written:
    """What came out: the files in the order of their making, and what a user should know."""

    files: list[Path] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Drawn]:
        """The pictures that could not be drawn."""
        return [each for each in self.drawn if each.problem]


def write_analysis(
    visualization: Visualization,
    subject: Subject,
    analysis: Analysis,
    capture: Capture,
    folder: Path,
    command: str,
    tell: Callable[[str], None],
) -> Written:
    """Draw and export everything into the folder. `tell`: told how long each picture took.

    Raises:
        OSError: the folder can't be written.
    """
    written = Written()
    run = run_text(subject, capture)
    for picture in analysis.pictures:
        started = time.perf_counter()
        drawn, warnings = draw_picture(picture, capture, visualization, folder, run)
        written.drawn.append(drawn)
        written.files += drawn.files
        written.warnings += warnings
        tell(f"{picture.name}: {time.perf_counter() - started:.2f} s")
    started = time.perf_counter()
    written.files += _tables(visualization, subject, analysis, capture, folder, written.drawn)
    if "html" in visualization.output.formats:
        page = folder / visualization.output.report_file
        gallery = _gallery(subject, capture, visualization, written, analysis.warnings, command)
        write_atomically(page, render_gallery(gallery))
        written.files.append(page)
    tell(f"tables and report: {time.perf_counter() - started:.2f} s")
    return written


def run_text(subject: Subject, capture: Capture) -> str:
    """Say in a few words what was measured on what: `smollm2, bfloat16, 8 × 512 tokens of sample`."""
    provenance = capture.provenance
    return f"{subject.name}, {provenance.model.dtype or ''}, {provenance.data.size}"


def _tables(
    visualization: Visualization,
    subject: Subject,
    analysis: Analysis,
    capture: Capture,
    folder: Path,
    drawn: Sequence[Drawn],
) -> list[Path]:
    wanted = [form for form in TABLES if form in visualization.output.formats]
    rows = rows_of(analysis, capture, visualization) if wanted else []
    about = {
        "name": subject.name, "meta": capture.provenance.plain(), "visualization": visualization.model_dump(),
        "pictures": [
            {"name": each.picture.name, "title": each.title, "site": each.picture.site, "problem": each.problem or None,
             "files": [path.name for path in each.files], "layers": list(each.picture.layers)}
            for each in drawn
        ],
    }  # fmt: skip
    encode: Mapping[str, Callable[[], bytes]] = {
        "csv": lambda: as_csv(rows),
        "json": lambda: as_json(rows, about),
        "parquet": lambda: as_parquet(rows),
    }
    files = []
    for form in wanted:
        files.append(folder / f"analysis.{form}")
        write_atomically(files[-1], encode[form]())
    if visualization.output.include_raw_data:
        files.append(folder / "capture.qsa")
        capture.save(files[-1])
    return files


def _gallery(
    subject: Subject,
    capture: Capture,
    visualization: Visualization,
    written: Written,
    warnings: Sequence[str],
    command: str,
) -> Gallery:
    sections: dict[str, list[Shown]] = {}
    for each in written.drawn:
        shown = Shown(each.title, each.picture.name, each.png, each.problem)
        sections.setdefault(HEADINGS[each.picture.section], []).append(shown)
    return Gallery(
        title=f"Analysis of {subject.name}",
        facts={**capture.provenance.facts(), **(capture.provenance.model.versions or {})},
        sections=sections,
        warnings=[*warnings, *written.warnings],
        layers=capture.modules,
        files=[path.name for path in written.files],
        command=command,
        surfaces=list(_surfaces(capture, visualization, written.drawn)),
    )


def _surfaces(capture: Capture, visualization: Visualization, drawn: Sequence[Drawn]) -> Iterator[Turning]:
    """Yield a surface that turns, with every layer that is in a picture of heat maps."""
    settings = visualization.heatmap_3d
    pictures = [each.picture for each in drawn if each.picture.section == "heatmap_3d" and not each.problem]
    wanted = {layer for picture in pictures for layer in picture.layers}
    if wanted:
        layers = [layer for layer in capture.modules if layer in wanted]
        maps, size = maps_of(capture, layers, settings.site, settings.sample_idx)
        yield Turning(HEADINGS["heatmap_3d"], "heatmap_3d", surface_data(maps, size, settings.view_angle))
