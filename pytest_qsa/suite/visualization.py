"""The section `visualization` of a suite: what `qsa analyze` draws, key for key as quant-smooth-ana has it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ..captures import Site
from .sections import Regex, Strict

Count = Annotated[int, Field(gt=0)]
Patterns = Annotated[list[Regex], Field(min_length=1)]
ExportFormat = Literal["png", "svg", "html", "csv", "json", "parquet"]


class Enabled(Strict):
    """Which pictures are drawn."""

    magnitude_input: bool = True
    magnitude_output: bool = True
    magnitude_weight: bool = False
    outlier_layer_wise: bool = True
    outlier_position: bool = True
    outlier_token: bool = True
    heatmap_3d: bool = False
    distribution: bool = False
    percentile_range: bool = False


class MagnitudeWeight(Strict):
    """Magnitudes of weights; `patterns` are those of the activations where they are absent."""

    patterns: Patterns | None = None
    reduce_dim: Literal[-1, -2] | None = -2


class MagnitudePlot(Strict):
    """Top1, top2, top3, median and min of the maxima over channels (−1), over tokens (−2), or of |x| itself (null)."""

    patterns: Patterns = Field(default=[r"mlp\.down_proj", r"mlp\.up_proj", r"self_attn\.q_proj", r"self_attn\.o_proj"])
    reduce_dim: Literal[-1, -2] | None = -1
    combined_plot: Annotated[bool, Field(description="one picture with a panel for each pattern")] = True
    weight: MagnitudeWeight = MagnitudeWeight()


class OutlierPlot(Strict):
    """Tokens whose largest |x| is above threshold × the median of their sample."""

    threshold: Annotated[float, Field(gt=0)] = 64.0
    pattern: Regex = "kind:blocks"
    decode_tokens: Annotated[bool, Field(description="show the tokens' text; false: their ids")] = True
    top_n: Annotated[int, Field(gt=0, description="how many different tokens are shown")] = 15


class OneSide(Strict):
    """A picture of the inputs of layers, or of their outputs."""

    is_input: bool = True

    @property
    def site(self) -> Site:
        """The site that the picture shows."""
        return "input" if self.is_input else "output"


class DistributionPlot(OneSide):
    """All elements of a layer as a box and as a histogram; `patterns` are the magnitudes' where they are absent."""

    patterns: Patterns | None = None
    plot_types: Annotated[list[Literal["boxplot", "histogram"]], Field(min_length=1)] = Field(
        default=["boxplot", "histogram"]
    )


class Heatmap(OneSide):
    """|x| of one sample over tokens and channels, as a surface and as a map."""

    pattern: Regex = "kind:blocks"
    sample_idx: Annotated[int, Field(ge=0)] = 0
    is_input: bool = False
    view_angle: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        default=[30, 45], description="elevation and azimuth, in degrees"
    )
    num_2d_layers: Annotated[int, Field(ge=0, description="how many layers are drawn as maps, evenly over depth")] = 6


class PercentilePlot(OneSide):
    """For each channel the percentiles over tokens; `patterns` are the magnitudes' where they are absent."""

    patterns: Patterns | None = None
    use_abs: bool = False
    style: Literal["fill", "line"] = "fill"
    num_layers_to_show: Annotated[int, Field(gt=0, description="how many layers of a pattern, evenly over depth")] = 4


class LayerSelection(Strict):
    """Narrows the layers of magnitudes, distributions and percentiles to those that match one of the patterns."""

    patterns: list[Regex] = Field(default=[])


def _plain_name(name: str) -> str:
    # Also what Windows forbids in names, because one suite serves all systems.
    if not name or name in (".", "..") or any(character in name for character in '/\\:*?"<>|\0'):
        raise ValueError(f"report_name '{name}' is a file's name, without a folder")
    return name


class Output(Strict):
    """The files that are written in addition to the pictures: the report, and the numbers in it."""

    formats: Annotated[list[ExportFormat], Field(min_length=1)] = Field(default=["png", "html"])
    report_name: Annotated[str, AfterValidator(_plain_name)] = "analysis_report.html"
    include_raw_data: Annotated[bool, Field(description="every sample's value in exports, and the capture itself")] = (
        False
    )

    @property
    def report_file(self) -> str:
        """The name of the report with its suffix."""
        return self.report_name if self.report_name.endswith((".html", ".htm")) else f"{self.report_name}.html"


class Visualization(Strict):
    """What `qsa analyze` draws and writes, into `save_dir` relative to the file."""

    save_dir: Annotated[str, Field(min_length=1)] = "./figures"
    dpi: Annotated[int, Field(ge=30, le=600)] = 200
    show_legend: bool = True
    enabled: Enabled = Enabled()
    magnitude: MagnitudePlot = MagnitudePlot()
    outlier: OutlierPlot = OutlierPlot()
    distribution: DistributionPlot = DistributionPlot()
    heatmap_3d: Heatmap = Heatmap()
    percentile_range: PercentilePlot = PercentilePlot()
    layer_selection: LayerSelection = LayerSelection()
    output: Output = Output()
