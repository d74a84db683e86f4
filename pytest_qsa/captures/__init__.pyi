from .cache import CaptureCache as CaptureCache
from .capture import Capture as Capture
from .channels import (
    CODES as CODES,
    FIRST_CODE as FIRST_CODE,
    SHIFT as SHIFT,
    BandStat as BandStat,
    channel_bands as channel_bands,
)
from .distributions import (
    bin_values as bin_values,
    counted_quantile as counted_quantile,
    counted_quantiles as counted_quantiles,
    sorted_counts as sorted_counts,
)
from .histograms import histograms_of as histograms_of
from .merging import added as added, merge as merge
from .numbers import (
    ERROR_NAMES as ERROR_NAMES,
    EXTREME_NAMES as EXTREME_NAMES,
    NOT_COMPARED as NOT_COMPARED,
    PADDING as PADDING,
    SCORE_NAMES as SCORE_NAMES,
    TOP_NAMES as TOP_NAMES,
    UNKNOWN as UNKNOWN,
    SiteNumbers as SiteNumbers,
    lower_median as lower_median,
    order_statistics as order_statistics,
    renumbered as renumbered,
)
from .partial import PartialSums as PartialSums
from .provenance import (
    FLOAT as FLOAT,
    UNKNOWN_MODEL as UNKNOWN_MODEL,
    UNKNOWN_RUN as UNKNOWN_RUN,
    DataProvenance as DataProvenance,
    ExecutedModules as ExecutedModules,
    Execution as Execution,
    FilesProvenance as FilesProvenance,
    ModelProvenance as ModelProvenance,
    Provenance as Provenance,
    SampleRange as SampleRange,
    ServedProvenance as ServedProvenance,
    data_fingerprint as data_fingerprint,
    module_count as module_count,
    since_text as since_text,
)
from .requests import (
    LOGITS as LOGITS,
    SITES as SITES,
    LayerSite as LayerSite,
    Request as Request,
    Site as Site,
    SiteKey as SiteKey,
    compares as compares,
    compile_pattern as compile_pattern,
    exactly as exactly,
    match_layers as match_layers,
    merge_requests as merge_requests,
    no_match as no_match,
)
from .sinks import Sinks as Sinks, find_sinks as find_sinks
from .statistics import (
    AGREEMENT as AGREEMENT,
    ALL_STATISTICS as ALL_STATISTICS,
    CHANNEL_COUNTS as CHANNEL_COUNTS,
    CHANNELS as CHANNELS,
    COUNTS as COUNTS,
    ELEMENTS as ELEMENTS,
    ERROR as ERROR,
    EXPERTS as EXPERTS,
    LAYOUTS as LAYOUTS,
    MOMENTS as MOMENTS,
    REFERENCE_SINKS as REFERENCE_SINKS,
    REFERENCE_TOKENS as REFERENCE_TOKENS,
    SCORES as SCORES,
    SIGNED_COUNTS as SIGNED_COUNTS,
    SINKS as SINKS,
    STORED as STORED,
    TOKENS as TOKENS,
    ChannelError as ChannelError,
    FeatureCounts as FeatureCounts,
    HeatMap as HeatMap,
    LocalError as LocalError,
    Massive as Massive,
    QuantizationPowers as QuantizationPowers,
    Statistic as Statistic,
    against_reference as against_reference,
    need_tokens as need_tokens,
    padded as padded,
    pairwise as pairwise,
)
