"""One batch as the observers need it: its samples, the axis of its tokens, and the tokens that are no padding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...captures import Picture
from ...common import AnomalyError, InfraError

Batch = Tensor | Mapping[str, Any]
CPU = torch.device("cpu")
MOST_PICTURES = 64
"""The most pictures that a capture keeps for its report, of 50 kB each."""
_TOKEN_KEYS = ("input_ids", "inputs_embeds", "decoder_input_ids", "attention_mask", "decoder_attention_mask")


_ENCODER_STATES = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention)\..*\b(k|v|key|value|[kv]_proj)$"
)
"""The layers of a decoder that read the encoder's output: the keys and values of cross-attention."""


@dataclass(frozen=True)
class Padding:
    """A mask [B, T]: for each row the indices of the tokens that are no padding; None where all count.

    `rows`: on the CPU. Each device gets one copy, made without waiting for it.
    """

    length: int
    rows: list[Tensor | None]
    _copies: dict[torch.device, list[Tensor | None]] = field(default_factory=dict)

    def on(self, device: torch.device) -> list[Tensor | None]:
        """Return the indices on a device."""
        if device not in self._copies:
            self._copies[device] = [None if row is None else row.to(device, non_blocking=True) for row in self.rows]
        return self._copies[device]


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch. `lengths`: the numbers of tokens, by which the token axis of a tensor is recognized.

    `flat`: it holds patches of a picture as rows of one tensor, [patches, n], and so do the layers that read them.
    """

    samples: list[int]
    lengths: frozenset[int]
    padding: Padding | None = None
    decoder_padding: Padding | None = None
    has_decoder: bool = False
    flat: bool = False

    @cached_property
    def all_count(self) -> list[Tensor | None]:
        """One None a row: all tokens of all rows count."""
        return [None] * len(self.samples)

    @cached_property
    def padded(self) -> bool:
        """Whether some token is padding."""
        return self.padding is not None or self.decoder_padding is not None

    @cached_property
    def whole(self) -> int | None:
        """The one sample, all of whose tokens count; None where there are more, or some don't."""
        return self.samples[0] if len(self.samples) == 1 and not self.padded else None

    def shaped(self, x: Tensor, channels_first: bool) -> tuple[Tensor, bool]:
        """Bring a tensor to [B, T, C] (true) or, where it has no token axis, to [B, n] (false).

        Raises:
            InfraError: the rows of the batch can't be told apart in it.
        """
        count = len(self.samples)
        shape = x.shape
        # The usual case comes first, for this is asked of every tensor of a pass.
        if len(shape) == 3 and shape[0] == count and not channels_first:
            return x, True
        if x.dim() and x.shape[0] == 1 != count:  # position embeddings and masks are shared by the samples
            x = x.expand(count, *x.shape[1:])
        latent = x.dim() == 4 and x.shape[0] == count and x.shape[1] == 1 != x.shape[2]
        if latent and x.shape[2] in self.lengths and not channels_first:
            x = x.squeeze(1)  # one head for all, as the latent keys and values of DeepSeek-V3 have it
        if x.dim() == 4 and x.shape[1] == count and x.shape[2] in self.lengths and not channels_first:
            if x.shape[0] == count != 1:
                raise InfraError(
                    f"a tensor of shape {tuple(x.shape)} has two axes that could be that of the {count} samples of a "
                    "batch; set data.batch_size to 1"
                )
            # Several copies of the residual stream (Gemma 3n's AltUp): all of them are channels of their token.
            x = x.permute(1, 2, 0, 3).flatten(2) if x.shape[0] != count else x
        if self.flat and count == 1 != x.shape[0] and x.dim() == 2 and not channels_first:
            return x[None], True
        flat_tokens = [length for length in self.lengths if x.dim() == 2 and x.shape[0] == count * length]
        if flat_tokens and x.shape[0] != count and not channels_first:
            return x.reshape(count, flat_tokens[0], -1), True
        if x.dim() >= 3 and x.shape[0] == count and not channels_first:
            if x.shape[1] in self.lengths:
                return x.flatten(2), True
            if x.dim() == 3:
                return x, True
        # an expert gets the tokens of all samples that were routed to it, in one tensor without a sample axis
        picked = x.dim() == 2 and bool(self.lengths) and x.shape[0] != count > 1
        if x.dim() == 0 or x.shape[0] % count or picked:
            raise InfraError(
                f"a tensor of shape {tuple(x.shape)} has no axis for the {count} samples of a batch; "
                "set data.batch_size to 1"
            )
        return x.reshape(count, -1), False

    def unpadded(self, layer: str, length: int, device: torch.device = CPU) -> list[Tensor | None]:
        """Return, for each row, the indices of the tokens that are no padding, on a device; None where all count.

        `length`: the tokens of the tensor; a mask of another length is that of other tokens.
        """
        # the encoder's tokens are padded apart from the decoder's, and cross-attention reads the encoder's
        in_decoder = self.has_decoder and "encoder" not in layer.split(".") and not _ENCODER_STATES.search(layer)
        padding = self.decoder_padding if in_decoder else self.padding
        return padding.on(device) if padding and padding.length == length else self.all_count


def listed(batches: object) -> list[Batch]:
    """Return the batches as a list, for a pass that starts again runs each of them once more.

    Raises:
        AnomalyError: there is none.
        TypeError: it is one batch rather than several, or one of them is no batch.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        # A tensor can be iterated over as well: its rows would be taken for batches.
        what = "wrap it, [batch]" if isinstance(batches, (Tensor, Mapping)) else "[B, T] tensors or dicts of arguments"
        raise TypeError(f"batches is a list of batches, not {kind_of(batches)}: {what}")
    samples: list[Any] = list(batches)
    if not samples:
        raise AnomalyError("there are no batches: nothing would be measured")
    for index, batch in enumerate(samples):
        if isinstance(batch, (tuple, list)):
            raise TypeError(
                f"batch {index} is {kind_of(batch)}, as a DataLoader makes it: give the tensor of inputs, "
                "[batch[0] for batch in loader], or a dict of the forward's arguments"
            )
        if not isinstance(batch, (Tensor, Mapping)):
            raise TypeError(f"batch {index} is {kind_of(batch)}: a batch is a tensor [B, T] or a dict of arguments")
        if isinstance(batch, Tensor) and batch.dim() == 0:
            raise TypeError(f"batch {index} is a tensor without dimensions: a batch is [B, T]")
    return samples


def kind_of(value: object) -> str:
    """Name the kind of a wrong argument: `a tuple`, `a tensor of shape (4, 8)`."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def rows_of(batch: Batch, first_sample: int) -> BatchRows:
    """Describe a batch before it runs. `first_sample`: the number of its first row among all samples.

    Raises:
        InfraError: it has no tensor, or one of its masks is not [B, T].
    """
    if isinstance(batch, Tensor):
        has_tokens = batch.dim() == 3 or (batch.dim() == 2 and not batch.is_floating_point())
        lengths = frozenset({int(batch.shape[1])} if has_tokens else ())
        return BatchRows(list(range(first_sample, first_sample + len(batch))), lengths)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    if not tensors:
        raise InfraError(f"a batch with the keys {sorted(batch)} holds no tensor")
    lengths = frozenset(int(tensors[key].shape[1]) for key in _TOKEN_KEYS if key in tensors and tensors[key].dim() >= 2)
    return BatchRows(
        samples=list(range(first_sample, first_sample + row_count(batch))),
        lengths=lengths,
        padding=_padding(tensors, "attention_mask"),
        decoder_padding=_padding(tensors, "decoder_attention_mask"),
        has_decoder="decoder_input_ids" in tensors,
        flat=any(name.startswith("pixel_values") and value.dim() == 2 for name, value in tensors.items()),
    )


def row_count(batch: Batch) -> int:
    """Return the number of rows of a batch: of its tokens where it has some, else of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    return len(next((tensors[key] for key in _TOKEN_KEYS if key in tensors), next(iter(tensors.values()))))


def _padding(batch: Mapping[str, Tensor], key: str) -> Padding | None:
    mask = batch.get(key)
    if mask is None or bool(mask.all()):
        return None
    if mask.dim() != 2:
        raise InfraError(f"the {key} of a batch has the shape {tuple(mask.shape)}; a mask of padding is [B, T]")
    rows = [None if bool(row.all()) else row.nonzero().flatten() for row in mask.cpu()]
    return Padding(int(mask.shape[1]), rows)


class MediaBatch(dict[str, Any]):
    """The forward arguments of one sample with a picture; `picture`: what a report shows of it."""

    picture: Picture | None = None


def pictures_of(batches: Iterable[Batch]) -> dict[int, Picture]:
    """Return sample → its picture, of the first ones."""
    batches, counts = list(batches), [0]
    for batch in batches:
        counts.append(counts[-1] + row_count(batch))
    shown = ((first, getattr(batch, "picture", None)) for first, batch in zip(counts, batches, strict=False))
    return dict(islice(((sample, each) for sample, each in shown if each is not None), MOST_PICTURES))


def token_ids(batch: Batch) -> list[Tensor]:
    """Return the token ids of each row, [T] int32 on the CPU; empty tensors where the batch has none."""
    ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
        return []
    return list(ids.cpu().int())
