from typing import Any, Literal

from .query import Positions
from .registry import Reduce
from .series import Series

class MetricMethods:
    def outlier_tokens(
        self, threshold: float = 64.0, *, reduce: Reduce | None = None, positions: Positions | None = None
    ) -> Series:
        """Count the tokens whose maximum is above threshold × the lower median of the sample (arXiv 2410.05265)."""

    def outlier_ratio(self, *, reduce: Reduce | None = None, positions: Positions | None = None) -> Series:
        """Divide the largest token-wise maximum of a sample by their lower median."""

    def magnitude(
        self,
        stat: Literal["top1", "top2", "top3", "median", "min", "min2", "min3"] = "top1",
        reduce_dim: Literal[-1, -2, "auto"] | None = "auto",
        *,
        reduce: Reduce | None = None,
        positions: Positions | None = None,
    ) -> Series:
        """Take an order statistic of the maxima over channels (−1, one a token), over tokens (−2), or of |x| (null)."""

    def sink_tokens(
        self,
        stat: Literal["count", "channel", "ratio"] = "count",
        *,
        reduce: Reduce | None = None,
        positions: Positions | None = None,
    ) -> Series:
        """Describe the sinks of a sample at this layer: how many stand out here, the channel, the multiple of the median."""

    def massive_activations(
        self,
        abs: float = 100.0,
        ratio: float = 1000.0,
        *,
        reduce: Reduce | None = None,
        positions: Positions | None = None,
    ) -> Series:
        """Count the elements with |x| > abs and |x| ≥ ratio × the sample's median |x| (Sun et al., arXiv 2402.17762)."""

    def absmax(self, *, positions: Positions | None = None) -> Series:
        """Take the largest |x|."""

    def rms(self, *, positions: Positions | None = None) -> Series:
        """Take the root of the mean square over all elements."""

    def mean(self, *, positions: Positions | None = None) -> Series:
        """Take the mean over all elements."""

    def std(self, *, positions: Positions | None = None) -> Series:
        """Take the standard deviation over all elements, of the population (divided by n)."""

    def kurtosis(self, *, reduce: Reduce | None = None, positions: Positions | None = None) -> Series:
        """Take Pearson's kurtosis E[(x−μ)⁴]/σ⁴ of a sample's elements; a Gaussian has 3."""

    def crest_factor(self, *, positions: Positions | None = None) -> Series:
        """Divide the largest |x| by the root mean square."""

    def quantile(self, q: float = 0.999, signed: bool = False, *, positions: Positions | None = None) -> Series:
        """Take the q-quantile of |x| (of x if signed), interpolated linearly as numpy does."""

    def channel_band(
        self,
        stat: Literal["min", "p0.01", "p1", "p25", "p75", "p99", "p99.99", "max"] = "p99",
        across: Literal["max", "median", "min", "mean"] = "max",
        signed: bool = False,
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Take a percentile, or an extreme, of |x| (of x if signed) in each channel, then fold the channels by `across`."""

    def quantization_sqnr(
        self,
        scheme: Literal["int8", "int4", "fp8_e4m3"] = "int8",
        by: Literal["tensor", "token", "channel", "group", "token_head", "checkpoint"] = "tensor",
        group_size: int = 128,
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Take 10·log10(Σx² / Σ(x − x̂)²), where x̂ is x rounded to the grid of the scheme and back."""

    def cache_clipping(self, *, positions: Positions | None = None) -> Series:
        """Count the elements beyond 448 × the layer's scale in the checkpoint, which a KV cache in FP8 (e4m3) clips."""

    def int8_outlier_features(
        self,
        abs: float = 6.0,
        layer_share: float = 0.25,
        position_share: float = 0.06,
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Count the channels with |x| ≥ abs in layer_share of the layers and position_share of all their tokens (LLM.int8)."""

    def expert_tokens(self, *, reduce: Reduce | None = None, positions: Positions | None = None) -> Series:
        """Count the tokens that the router sends to each expert: [P, E]; one that chooses k experts counts k times."""

    def zero_fraction(self, *, positions: Positions | None = None) -> Series:
        """Take the share of exact zeros."""

    def nonfinite(self, *, reduce: Reduce | None = None, positions: Positions | None = None) -> Series:
        """Count NaN, +Inf and −Inf."""

    def headroom(
        self,
        dtype: Literal["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"] = "float16",
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Divide the largest |x| by the largest finite value of the dtype that will be served (float16: 65504)."""

    def margin_ratio(
        self, stat: Literal["median", "mean", "p10"] = "median", *, positions: Positions | None = None
    ) -> Series:
        """Take max(0, m̂) / m of each position whose margin m is 0.5 or more: how much of a clear decision is left."""

    def flips(
        self, margin_from: float = 0.0, margin_to: float | None = None, *, positions: Positions | None = None
    ) -> Series:
        """Take the share of the positions with margin_from ≤ m < margin_to whose likeliest token is another one."""

    def boundary_tokens(
        self,
        stat: Literal["recall", "missed", "spurious"] = "recall",
        tokens: str = "auto",
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Look at where the reference ends an answer or marks a thought or a tool call: the share that the model does too."""

    def embedding(
        self,
        stat: Literal["order", "recall", "cosine"] = "order",
        k: int = 5,
        pool: Literal["mean", "first", "last"] = "mean",
    ) -> Series:
        """Compare each sample's embedding, and which other samples it finds nearest by cosine, with the reference's."""

    def engine_gap(
        self,
        stat: Literal["rms", "outlier_tokens", "absmax", "kl"] = "rms",
        relative: bool = True,
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Take |ln(a / b)| of a layer's rms or absmax, or |a − b| of its outlier tokens, in model.engine and transformers."""

    def mtp_acceptance(self, *, positions: Positions | None = None) -> Series:
        """Take the share of the tokens that the checkpoint's MTP head drafts in vLLM which the model itself would write."""

    def sqnr(
        self, by: Literal["tensor", "token", "channel"] = "tensor", *, positions: Positions | None = None
    ) -> Series:
        """Take 10·log10(Σx² / Σ(x − x̂)²), x the reference's; of the tensor, or of its worst token or channel."""

    def nmse(self, *, positions: Positions | None = None) -> Series:
        """Take Σ(x − x̂)² / Σx², x the reference's (torch.ao, NNCF)."""

    def relative_l2(self, *, positions: Positions | None = None) -> Series:
        """Take the root of `nmse`: ‖x − x̂‖ / ‖x‖."""

    def cosine(self, *, positions: Positions | None = None) -> Series:
        """Take ⟨x, x̂⟩ / (‖x‖·‖x̂‖) of all elements (Polygraphy gates at 0.997); blind to scale."""

    def max_abs_diff(self, *, positions: Positions | None = None) -> Series:
        """Take the largest |x − x̂|; of the recorded tokens alone, where the reference is a file."""

    def local_sqnr(self, rows: int = 32, *, positions: Positions | None = None) -> Series:
        """Take the layer's own SQNR: its output on the reference's input against the reference's output."""

    def weight_sqnr(self, by: Literal["tensor", "channel"] = "tensor") -> Series:
        """Take the SQNR of the dequantized weight against the reference's; `channel`: its worst output channel, a row."""

    def weight_gain(self, stat: Literal["room", "factor"] = "room") -> Series:
        """Take the factor g = Σw·w₀ / Σw₀² of the scale group farthest from 1, w₀ the reference's weights of the group."""

    def new_outliers(
        self, threshold: float = 64.0, *, reduce: Reduce | None = None, positions: Positions | None = None
    ) -> Series:
        """Count the tokens above threshold × the median of their sample here that are not in the reference."""

    def lost_outliers(
        self, threshold: float = 64.0, *, reduce: Reduce | None = None, positions: Positions | None = None
    ) -> Series:
        """Count the tokens above threshold × the median of their sample in the reference that are not here."""

    def loaded_weights(self) -> Series:
        """Take ‖w − w₀‖ / ‖w₀‖, w the loaded model's dequantized weight, w₀ the file's by its quantizer's own library."""

    def generation(
        self, stat: Literal["ended", "length_ratio", "repetition", "valid_json", "markup_kept", "diverged_at"] = "ended"
    ) -> Series:
        """Compare greedy answers with the reference's own, over the prompts of the suite's `generation`."""

    def kl_divergence(
        self, stat: Literal["mean", "median", "p99", "max"] = "mean", *, positions: Positions | None = None
    ) -> Series:
        """Take Σ p·(ln p − ln q) over the vocabulary at each position, p the reference's, then a statistic of them all."""

    def growth(
        self,
        of: Literal["kl_divergence"] = "kl_divergence",
        paired: bool = False,
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Divide the mean KL divergence over the last quarter of each sample's positions by that over the second quarter."""

    def same_top(self, *, positions: Positions | None = None) -> Series:
        """Take the share of positions where both models find the same token likeliest; a tie is no difference."""

    def overlap(self, *, positions: Positions | None = None) -> Series:
        """Take the mean of Σ min(p, q) over the vocabulary at each position: 1 − the total variation of both predictions."""

    def delta_p(
        self,
        stat: Literal["rms", "mean", "p1", "p5", "p50", "p95", "p99", "min", "max"] = "rms",
        *,
        positions: Positions | None = None,
    ) -> Series:
        """Take q − p of the probability of the text's next token, p the reference's; then a statistic of all positions."""

    def perplexity(self, *, positions: Positions | None = None) -> Series:
        """Take exp of the mean −ln q of the text's next tokens, all samples pooled."""

    def ln_ppl_ratio(self, *, positions: Positions | None = None) -> Series:
        """Take the mean of nll_q − nll_p, position by position: ln of the ratio of the perplexities (llama.cpp)."""

    def __getattr__(self, name: str) -> Any: ...
