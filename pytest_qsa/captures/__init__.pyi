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
    LOGITS as LOGITS,
    MOMENTS as MOMENTS,
    REFERENCE_SINKS as REFERENCE_SINKS,
    REFERENCE_TOKENS as REFERENCE_TOKENS,
    SCORES as SCORES,
    SIGNED_COUNTS as SIGNED_COUNTS,
    SINKS as SINKS,
    SITES as SITES,
    STORED as STORED,
    TOKENS as TOKENS,
    LayerSite as LayerSite,
    Request as Request,
    Site as Site,
    SiteKey as SiteKey,
    against_reference as against_reference,
    channel_error_statistic as channel_error_statistic,
    compares as compares,
    compile_pattern as compile_pattern,
    exactly as exactly,
    features_statistic as features_statistic,
    local_statistic as local_statistic,
    map_statistic as map_statistic,
    massive_statistic as massive_statistic,
    match_layers as match_layers,
    merge_requests as merge_requests,
    need_tokens as need_tokens,
    no_match as no_match,
    pairwise as pairwise,
    quantization_statistic as quantization_statistic,
)
