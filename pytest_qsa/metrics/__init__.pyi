from .activations import ACROSS as ACROSS, AcrossChannels as AcrossChannels, no_experts as no_experts
from .decisions import LEAST_BOUNDARIES as LEAST_BOUNDARIES
from .divergence import ks as ks, psi as psi, wasserstein as wasserstein
from .fidelity import (
    CARRIED_SIGMAS as CARRIED_SIGMAS,
    FAINT as FAINT,
    FEW_SIGMAS as FEW_SIGMAS,
    LARGEST as LARGEST,
    LARGEST_CODE as LARGEST_CODE,
    LEAST_EXPONENT as LEAST_EXPONENT,
    LEAST_ROOM as LEAST_ROOM,
    LOSSLESS as LOSSLESS,
    MANTISSA_BITS as MANTISSA_BITS,
    MOST_ROOM as MOST_ROOM,
    NOISE as NOISE,
    OWN as OWN,
    ROOM_SIGMAS as ROOM_SIGMAS,
    SIGNAL as SIGNAL,
    UNEXPLAINED as UNEXPLAINED,
    Granularity as Granularity,
    Scheme as Scheme,
    compared as compared,
    compared_tokens as compared_tokens,
    decibels as decibels,
    group_gain as group_gain,
    local_powers as local_powers,
    local_tokens as local_tokens,
    made_by_loader as made_by_loader,
    rounded_to as rounded_to,
)
from .generation import Answer as Answer, answered as answered
from .intervals import (
    LEAST_WINDOWS as LEAST_WINDOWS,
    mean_by_window as mean_by_window,
    newcombe as newcombe,
    t_quantile as t_quantile,
    wilson as wilson,
)
from .predictions import (
    KL as KL,
    NLL as NLL,
    REFERENCE_NLL as REFERENCE_NLL,
    TokenScores as TokenScores,
    numbers_of as numbers_of,
)
from .query import (
    CHECKPOINT as CHECKPOINT,
    EVALS as EVALS,
    Over as Over,
    PlainQuery as PlainQuery,
    Positions as Positions,
    Query as Query,
    canonical_positions as canonical_positions,
    check_arguments as check_arguments,
    positions_of as positions_of,
    query_of as query_of,
)
from .registry import (
    ANY as ANY,
    DTYPE_MAX as DTYPE_MAX,
    METRICS as METRICS,
    TWO_SIDED_95 as TWO_SIDED_95,
    Definition as Definition,
    Estimate as Estimate,
    Metric as Metric,
    Parameters as Parameters,
    Reduce as Reduce,
    metric as metric,
)
from .selection import (
    NO_BLOCKS as NO_BLOCKS,
    NotMeasuredError as NotMeasuredError,
    Selection as Selection,
    needs_sinks as needs_sinks,
)
from .series import (
    MOST_RELATIVE as MOST_RELATIVE,
    OVER as OVER,
    Bounds as Bounds,
    Judge as Judge,
    Series as Series,
)
from .view import View as View
