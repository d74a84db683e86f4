"""Statistics: what a pass can keep of a tensor stream, one class each. numpy only.

A class says under which name a suite's plan, a capture's file and the cache know it, which arrays it keeps, how these
are joined from the populations of a site and merged with those of other samples, and what it needs of the site. Its
reduction by torch is in engine/reduce, under the same name. A population is one call of a layer for one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar, Literal, get_type_hints

from ..common import SuiteError, did_you_mean
from .arrays import (
    BINS,
    EXTREMES,
    LARGEST,
    OF_A_SAMPLE,
    OF_THE_SITE,
    OF_THE_WEIGHT,
    PER_POPULATION,
    PER_TOKEN,
    RAGGED,
    SUM,
    Layout,
    counts_of,
)

STATISTICS: dict[str, type[Statistic]] = {}
"""Name → class."""
LAYOUTS: dict[str, Layout] = {}
"""Array → its layout."""


@dataclass(frozen=True)
class Statistic:
    """One statistic with its parameters, which are the fields of its class. Its text is the name and the parameters.

    `arrays`: the arrays of `SiteNumbers` that it keeps. `by_parameters`: it keeps its array once for each set of
    parameters. `of_logits`: it is taken of what the model predicts, not of a layer's tensor. `needs_tokens`: only a
    site with a token axis has it. `reference`: whether it is taken of the subject alone, of the reference's own
    tensors, or of both models' tensors as a pair. `alone`: the layer is run by itself, so that the layers of packed
    experts have it, which the forward doesn't call. `of_files`: the checkpoint's files answer it, whatever model runs.
    `default`: it is kept where nothing is chosen; the others cost much, so that only a site that names them gets them.
    `by_token`: its numbers tell the tokens of a sample apart, or its parameters say which count; any other has to know
    a range of positions in the pass (`InRange`). `token_bytes`, `channel_bytes`, `site_bytes`: about what it keeps of
    each.
    """

    name: ClassVar[str] = ""
    arrays: ClassVar[Mapping[str, Layout]] = {}
    by_parameters: ClassVar[bool] = False
    of_logits: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    reference: ClassVar[Literal["", "own", "pair"]] = ""
    alone: ClassVar[bool] = False
    of_files: ClassVar[bool] = False
    default: ClassVar[bool] = False
    by_token: ClassVar[bool] = False
    token_bytes: ClassVar[int] = 0
    channel_bytes: ClassVar[int] = 0
    site_bytes: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        """Register the class under its name, and the layouts of its arrays."""
        # The whole registration: a new statistic needs no list that names it.
        STATISTICS[cls.name] = cls
        LAYOUTS.update(cls.arrays)

    def __str__(self) -> str:
        """Return the text by which plans, captures and the cache know it: `massive:100:1000`."""
        text: str | None = self.__dict__.get("_text")
        if text is None:
            # 17 digits give back the same float, so that equal parameters are found again in a file.
            values = (getattr(self, field.name) for field in fields(self))
            text = ":".join([self.name, *(f"{v:.17g}" if isinstance(v, float) else str(v) for v in values)])
            self.__dict__["_text"] = text  # sets of statistics ask for it thousands of times in a pass
        return text

    def __hash__(self) -> int:
        # The classes without parameters would all have the hash of an empty tuple.
        return hash(str(self))

    def __lt__(self, other: Statistic) -> bool:
        # The order of the texts is that of captures' headers and of plans, whose bytes stay.
        return str(self) < str(other)

    @property
    def key(self) -> str:
        """The name of its array, of the first one where it keeps several."""
        array = next(iter(self.arrays), "")
        return f"{array}/{self}" if self.by_parameters else array

    def kept_bytes(self, samples: int, tokens: int, channels: int) -> int:
        """Return about how many bytes it keeps of one site, over `samples` samples of `tokens` tokens in all."""
        return self.token_bytes * tokens + self.channel_bytes * channels + self.site_bytes

    @staticmethod
    @lru_cache
    def parse(text: str) -> Statistic:
        """Read what `str` wrote.

        Raises:
            SuiteError: there is no such statistic, or it doesn't take these parameters.
        """
        name, _, rest = text.partition(":")
        kind = STATISTICS.get(name)
        if kind is None:
            raise SuiteError(f"unknown statistic '{text}'{did_you_mean(name, STATISTICS)}")
        # Under `from __future__ import annotations` the type of a field is a string.
        types = [get_type_hints(kind)[field.name] for field in fields(kind)]
        # The last parameter may hold a colon itself, as in channel_error:skip_first:4.
        values = rest.split(":", len(types) - 1) if rest and types else [rest] if rest else []
        try:
            return kind(*(of(value) for of, value in zip(types, values, strict=True)))
        except ValueError:
            names = "".join(f":{field.name}" for field in fields(kind))
            raise SuiteError(f"the statistic '{text}' is not of the form {name}{names}") from None


BIN_BYTES = 8 << 15
"""The bytes of the counts of |x|, which has 2¹⁵ patterns."""


class Tokens(Statistic):
    """The largest |x| of each token, and which tokens are the largest.

    `token_max` [sum of lengths] float32: populations one after the other, −1 at padding. `peaks` [P, K]: the positions
    of the K largest tokens, largest first. `peak_channels` [P, K]: their channels.
    """

    name = "tokens"
    by_token = True
    arrays: ClassVar = {"token_max": PER_TOKEN, "peaks": RAGGED, "peak_channels": RAGGED}
    needs_tokens = True
    default = True
    token_bytes = 4


class Channels(Statistic):
    """The largest |x| of each channel.

    `channel_top` [P, 7] float32: top1, top2, top3, lower median, min3, min2, min of them in each population.
    `channel_max` [C] float32: the largest over all populations.
    """

    name = "channels"
    arrays: ClassVar = {"channel_top": PER_POPULATION, "channel_max": LARGEST}
    needs_tokens = True
    default = True
    channel_bytes = 4


class Elements(Statistic):
    """Order statistics of |x|: `element_top` [P, 7] float32, top1, top2, top3, lower median, min3, min2, min."""

    name = "elements"
    arrays: ClassVar = {"element_top": PER_POPULATION}
    default = True


class Moments(Statistic):
    """Power sums: `moments` [P, 7] float64, n, mean, Σ(x − mean)², Σ(x − mean)⁴, max |x|, zeros, NaN and Inf."""

    name = "moments"
    arrays: ClassVar = {"moments": PER_POPULATION}
    default = True


class Counts(Statistic):
    """How often each 16-bit pattern of |x| occurs: `bins`, `counts` int64, bins that don't occur left out.

    float32 is counted by its upper 16 bits. `extremes` [4] float32, always exact: the largest and smallest |x|, the
    smallest and largest x (NaN where the signs are not counted).
    """

    name = "counts"
    arrays: ClassVar = {"counts": counts_of("bins"), "bins": BINS, "extremes": EXTREMES}
    default = True
    site_bytes = BIN_BYTES


class SignedCounts(Statistic):
    """How often each 16-bit pattern of x occurs: `signed_bins`, `signed_counts`, and `extremes` as of `counts`."""

    name = "signed_counts"
    arrays: ClassVar = {"signed_counts": counts_of("signed_bins"), "signed_bins": BINS, "extremes": EXTREMES}
    default = True
    site_bytes = 2 * BIN_BYTES


class SinkTokens(Statistic):
    """The tokens that may be attention sinks: the statistic `tokens` at the outputs of the blocks."""

    name = "sinks"
    by_token = True
    default = True


class Experts(Statistic):
    """How many tokens the router sends to each expert of a layer of packed experts: `experts` [P, E] int64."""

    name = "experts"
    arrays: ClassVar = {"experts": PER_POPULATION}
    default = True


class ChannelCounts(Statistic):
    """How often x falls into each of 16 bins an octave, channel by channel (captures/distributions.py).

    `channel_bins` [B] uint16, `channel_counts` [B, C] uint32; bins that are empty in all channels are left out.
    `channel_extremes` [4, C] float32: the extremes of each channel, as those of `counts`.
    """

    name = "channel_counts"
    arrays: ClassVar = {"channel_counts": counts_of("channel_bins"), "channel_bins": BINS, "channel_extremes": EXTREMES}
    needs_tokens = True
    channel_bytes = 6144  # measured: docs/metrics.md


class Scores(Statistic):
    """How likely the model found each next token: `scores` [sum of lengths, 4] float64, in nats.

    −ln q and −ln p of the token that came, q the model's probability and p the reference's; KL(p‖q); 1 where both
    models find the same token likeliest. NaN where there is no next token, or no reference.
    """

    name = "scores"
    by_token = True
    arrays: ClassVar = {"scores": PER_TOKEN}
    of_logits = True


class PredictionAgreement(Statistic):
    """How far the predictions of two models are apart: the columns of `scores` that need the reference."""

    name = "agreement"
    by_token = True
    arrays: ClassVar = {"scores": PER_TOKEN}
    of_logits = True
    reference = "pair"


class PredictionOverlap(Statistic):
    """How much of two models' predictions is common to both: `overlap` [sum of lengths] float64, Σ min(p, q).

    p, q: the reference's and the subject's probabilities of the next token. NaN at padding.
    """

    name = "overlap"
    by_token = True
    arrays: ClassVar = {"overlap": PER_TOKEN}
    of_logits = True
    reference = "pair"
    token_bytes = 8


class PredictionMargins(Statistic):
    """How clearly two models prefer the reference's token: `margins` [sum of lengths, 4] float64, `MARGIN_NAMES`.

    NaN at padding.
    """

    name = "margins"
    by_token = True
    arrays: ClassVar = {"margins": PER_TOKEN}
    of_logits = True
    reference = "pair"
    token_bytes = 32


@dataclass(frozen=True)
class BoundaryTokens(Statistic):
    """Where a text ends, begins or marks something: an array `boundary` [sum of lengths, 3] float64, `BOUNDARY_NAMES`.

    `tokens`: `auto`, or the texts of the boundaries with spaces between them. NaN at padding, outside of answers, and
    where no token follows.
    """

    tokens: str
    name = "boundary"
    by_token = True
    arrays: ClassVar = {"boundary": PER_TOKEN}
    by_parameters = True
    of_logits = True
    reference = "pair"
    token_bytes = 24


class WindowShifts(Statistic):
    """Which samples are windows of one text that overlap: `shifts` [P] int64.

    By how many tokens the next sample begins later in this one's text; 0 where the two share too few tokens
    (captures/windows.py). Known from the tokens alone.
    """

    name = "shifts"
    by_token = True
    arrays: ClassVar = {"shifts": PER_POPULATION}
    of_logits = True


class GeneratedAnswers(Statistic):
    """What two models answer to the same prompts, a population a prompt; a site of its own has it, `GENERATION`.

    `generation` [P, 11] float64: `GENERATION_NAMES`. `answers`, `reference_answers` [P, K] int32: the ids of their
    tokens, −1 behind the last one.
    """

    name = "generation"
    by_token = True
    arrays: ClassVar = {"generation": PER_POPULATION, "answers": RAGGED, "reference_answers": RAGGED}
    of_logits = True
    reference = "pair"


class StoredError(Statistic):
    """How far a loaded weight w is from the file's w₀: `stored` [4] float64, Σw₀², Σ(w − w₀)², Σw·w₀, Σw²."""

    name = "stored"
    arrays: ClassVar = {"stored": OF_THE_WEIGHT}


class GroupGain(Statistic):
    """How far the scale group of a weight that is farthest from the reference's is: `gain` [6] float64, `GAIN_NAMES`.

    Which weights share a scale is known from the files alone.
    """

    name = "gain"
    arrays: ClassVar = {"gain": OF_THE_WEIGHT}
    reference = "pair"
    of_files = True


class TokenError(Statistic):
    """The powers of each token's error: `error` [sum of lengths, 4] float32, Σx², Σ(x − x̂)², Σx̂², max |x − x̂|.

    x is the reference's. −1 at padding, −2 at a token that a kept reference did not draw. [P, 4] without a token axis.
    """

    name = "error"
    by_token = True
    arrays: ClassVar = {"error": PER_TOKEN}
    reference = "pair"
    token_bytes = 16


class OtherPredictions(Statistic):
    """How far a model's predictions are from transformers', where another engine runs it, on the same tokens.

    `other_kl`, `eager_kl` [sum of lengths] float64: KL(p ‖ q) in nats, p of transformers; q of the engine, and of
    transformers with eager attention, which is the noise of an implementation. NaN where nothing is predicted.
    """

    name = "other_predictions"
    by_token = True
    arrays: ClassVar = {"other_kl": PER_TOKEN, "eager_kl": PER_TOKEN}
    of_logits = True
    token_bytes = 16


class DraftedTokens(Statistic):
    """What the checkpoint's own head of several tokens (MTP) drafts in vLLM while each sample is continued.

    `drafts` [P, 2] float64: how many tokens it drafted, and how many of them the model would have written.
    """

    name = "drafts"
    by_token = True
    arrays: ClassVar = {"drafts": PER_POPULATION}
    of_logits = True


class OtherEngine(Statistic):
    """What transformers has at a site of a model that another engine runs, on the same tokens.

    `other_moments` [P, 7] and `other_max` [sum of lengths]: as `moments` and `token_max`. `eager_moments`, `eager_max`:
    the same with eager attention; how far both are apart is the noise of an implementation.
    """

    name = "other_engine"
    by_token = True
    arrays: ClassVar = {
        "other_moments": PER_POPULATION, "other_max": PER_TOKEN,
        "eager_moments": PER_POPULATION, "eager_max": PER_TOKEN,
    }  # fmt: skip
    needs_tokens = True
    token_bytes = 8


class ReferenceTokens(Statistic):
    """The statistic `tokens` of the reference."""

    name = "reference_tokens"
    by_token = True
    needs_tokens = True
    reference = "own"


class ReferenceSinks(Statistic):
    """The statistic `sinks` of the reference."""

    name = "reference_sinks"
    by_token = True
    reference = "own"


@dataclass(frozen=True)
class Massive(Statistic):
    """How many elements have |x| > absolute and |x| ≥ ratio × the population's median: an array `massive` [P] int64.

    The pass has to know both thresholds. −1 where the population holds NaN or Inf.
    """

    absolute: float
    ratio: float
    name = "massive"
    arrays: ClassVar = {"massive": PER_POPULATION}
    by_parameters = True


@dataclass(frozen=True)
class QuantizationPowers(Statistic):
    """Σx² and Σ(x − x̂)² under a simulated quantization: an array `quantized` [P, 2] float64.

    `by`: whose scale it is, a `token`'s, `channel`'s or `group`'s of `group_size` neighbours (0 for the others), or, at
    the sites of the KV cache, that of one head of one token, `token_head`.
    """

    scheme: str
    by: str
    group_size: int
    name = "quantized"
    arrays: ClassVar = {"quantized": PER_POPULATION}
    by_parameters = True
    needs_tokens = True

    def __post_init__(self) -> None:
        # Two requests must not differ by a group size that neither uses.
        if self.by != "group":
            object.__setattr__(self, "group_size", 0)


class CacheScale(Statistic):
    """The scale of a layer's keys or values in the checkpoint: `cache_scale` [1] float64; 1 where it holds none.

    [heads] where the checkpoint has one for each head.
    """

    name = "cache_scale"
    by_token = True  # the same of every token
    arrays: ClassVar = {"cache_scale": OF_THE_SITE}


@dataclass(frozen=True)
class FeatureCounts(Statistic):
    """In how many tokens each channel reaches |x| ≥ absolute: an array `features` [C + 2] int64.

    The last two are how many tokens and how many NaN and Inf there are. The pass has to know the threshold.
    """

    absolute: float
    name = "features"
    arrays: ClassVar = {"features": SUM}
    by_parameters = True
    needs_tokens = True
    channel_bytes = 8


MAP_SIZE = 128
"""The largest side of a map."""


def cell_size(size: int, most: int = MAP_SIZE) -> int:
    """Return how many neighbours a cell is the largest of, so that there are at most `most` cells.

    A last cell of fewer would be lower by that alone; so the next divisor is taken, up to twice as large.
    """
    least = -(-size // most)
    return next((cell for cell in range(max(least, 1), 2 * least + 1) if size % cell == 0), max(least, 1))


@dataclass(frozen=True)
class HeatMap(Statistic):
    """|x| of the first call of one sample, made smaller: an array `maps` [≤ 128, ≤ 128] float32.

    Each cell is the largest of a rectangle of equally many tokens and channels, 0 where all its tokens are padding.
    """

    sample: int
    name = "map"
    arrays: ClassVar = {"maps": OF_A_SAMPLE}
    by_parameters = True
    needs_tokens = True
    site_bytes = 4 * MAP_SIZE * MAP_SIZE


@dataclass(frozen=True)
class LocalError(Statistic):
    """A layer's own error: its output on the reference's input, of `rows` sampled tokens of each sample.

    `local_rows` [P, R]: the positions of the tokens, −1 for none. `local` [P, R, 3] float32: their Σy², Σ(y − ŷ)², Σŷ².
    Where a site has several, these are of the most rows; the others are `local_rows/local:ROWS`, `local/local:ROWS`.
    """

    rows: int
    name = "local"
    by_token = True
    arrays: ClassVar = {"local_rows": RAGGED, "local": PER_POPULATION}
    needs_tokens = True
    reference = "pair"
    alone = True

    @property
    def keys(self) -> tuple[str, str]:
        """The names of its arrays at a site where another one has more rows."""
        # Alone it has the plain names: captures were written so before a site could have several.
        return f"local_rows/{self}", f"local/{self}"

    def kept_bytes(self, samples: int, tokens: int, channels: int) -> int:
        """16 bytes a sampled token."""
        return 16 * self.rows * samples


@dataclass(frozen=True)
class ChannelError(Statistic):
    """Σx² and Σ(x − x̂)² of each channel over the tokens that `positions` names: an array `channel_error` [P, 2, C].

    The pass has to know which tokens count. float64.
    """

    positions: str
    name = "channel_error"
    by_token = True
    arrays: ClassVar = {"channel_error": PER_POPULATION}
    by_parameters = True
    reference = "pair"

    def kept_bytes(self, samples: int, tokens: int, channels: int) -> int:
        """Two float64 a sample and channel."""
        return 16 * samples * channels


@dataclass(frozen=True)
class Pooled(Statistic):
    """A sample's embedding in two models: `pooled/pooled:POOL` [P, 2, C] float64, the reference's and the model's.

    `pool`: how the tokens that are no padding become one: their `mean`, the `first` or the `last`.
    """

    pool: str
    name = "pooled"
    by_token = True
    arrays: ClassVar = {"pooled": PER_POPULATION}
    by_parameters = True
    reference = "pair"

    def kept_bytes(self, samples: int, tokens: int, channels: int) -> int:
        """Two float64 a sample and channel."""
        return 16 * samples * channels


@dataclass(frozen=True)
class InRange(Statistic):
    """Another statistic of some tokens of each sample alone: of those that are no padding, from `start` up to `end`.

    `end` −1: to the sample's end. `of`: the other statistic, whose arrays it keeps under names of their own.
    `in_range` [P] int64: how many tokens of a population lie in it; where that is 0, its rows of the others are zeros.
    """

    start: int
    end: int
    of: str
    name = "range"
    arrays: ClassVar = {"in_range": PER_POPULATION}
    by_parameters = True
    needs_tokens = True

    @property
    def inner(self) -> Statistic:
        """The other statistic."""
        return Statistic.parse(self.of)

    @property
    def tokens(self) -> slice:
        """Which of a sample's tokens that count lie in it."""
        return slice(self.start, None if self.end < 0 else self.end)

    @staticmethod
    def named(text: str, array: str) -> str:
        """Return under which name the one of this text keeps what its other statistic calls `array`."""
        return f"{array.partition('/')[0]}/{text}"

    def kept_bytes(self, samples: int, tokens: int, channels: int) -> int:
        """What the other statistic keeps."""
        return 8 * samples + self.inner.kept_bytes(samples, tokens, channels)


TOKENS: Statistic = Tokens()
CHANNELS: Statistic = Channels()
ELEMENTS: Statistic = Elements()
MOMENTS: Statistic = Moments()
COUNTS: Statistic = Counts()
SIGNED_COUNTS: Statistic = SignedCounts()
SINKS: Statistic = SinkTokens()
EXPERTS: Statistic = Experts()
CACHE_SCALE: Statistic = CacheScale()
CHANNEL_COUNTS: Statistic = ChannelCounts()
SCORES: Statistic = Scores()
AGREEMENT: Statistic = PredictionAgreement()
STORED: Statistic = StoredError()
GAIN: Statistic = GroupGain()
GENERATED: Statistic = GeneratedAnswers()
SHIFTS: Statistic = WindowShifts()
ERROR: Statistic = TokenError()
REFERENCE_TOKENS: Statistic = ReferenceTokens()
OTHER_ENGINE: Statistic = OtherEngine()
OTHER_PREDICTIONS: Statistic = OtherPredictions()
DRAFTS: Statistic = DraftedTokens()
REFERENCE_SINKS: Statistic = ReferenceSinks()

ALL_STATISTICS = frozenset(kind() for kind in STATISTICS.values() if kind.default)
"""The statistics of a site that names none."""
