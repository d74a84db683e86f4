"""How the rows of a batch are told apart: which axis of a tensor is whose, and which tokens of a row count."""

import pytest
import torch

from pytest_qsa.common import InfraError
from pytest_qsa.engine.load.batches import BatchRows, rows_of, token_ids

TOKENS = True
NO_TOKENS = False
SHAPES = {
    # case: (samples, numbers of tokens, shape, channels first, the shape that it becomes, has it a token axis)
    "a stream of tokens": (2, {5}, (2, 5, 8), False, (2, 5, 8), TOKENS),
    "tokens of another number, as a vision tower's": (2, {5}, (2, 6, 8), False, (2, 6, 8), TOKENS),
    "tokens where the batch has none": (2, set(), (2, 6, 8), False, (2, 6, 8), TOKENS),
    "one row that every sample sees": (2, {5}, (1, 5, 8), False, (2, 5, 8), TOKENS),
    "positions that every sample sees": (2, {5}, (1, 5), False, (2, 5), NO_TOKENS),
    "rows and tokens in one axis": (2, {5}, (10, 8), False, (2, 5, 8), TOKENS),
    "rows and a decoder's tokens in one axis": (2, {5, 3}, (6, 8), False, (2, 3, 8), TOKENS),
    "one sample's tokens without an axis for it": (1, {5}, (5, 8), False, (1, 5, 8), TOKENS),
    "an expert's tokens of one sample": (1, {5}, (3, 8), False, (1, 24), NO_TOKENS),
    "heads behind the tokens": (2, {5}, (2, 5, 4, 8), False, (2, 5, 32), TOKENS),
    "heads before the tokens": (2, {5}, (2, 4, 5, 8), False, (2, 160), NO_TOKENS),
    "a row of features": (2, {5}, (2, 8), False, (2, 8), NO_TOKENS),
    "a row of features, with one token each": (2, {1}, (2, 8), False, (2, 8), NO_TOKENS),
    "one number a row": (2, {5}, (2,), False, (2, 1), NO_TOKENS),
    "patches of all rows in one axis": (2, set(), (6, 8), False, (2, 24), NO_TOKENS),
    "patches of two axes": (2, {5}, (6, 3, 8), False, (2, 72), NO_TOKENS),
    "channels before positions": (2, {5}, (2, 8, 5), True, (2, 40), NO_TOKENS),
    "channels before an image": (2, set(), (2, 3, 4, 4), True, (2, 48), NO_TOKENS),
    "channels first, rows and tokens in one axis": (2, set(), (10, 8), True, (2, 40), NO_TOKENS),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_tensor_is_brought_to_the_rows_of_its_batch(case):
    samples, lengths, shape, channels_first, becomes, token_axis = SHAPES[case]
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    found, axis = BatchRows(list(range(samples)), frozenset(lengths)).shaped(x, channels_first)
    assert (tuple(found.shape), axis) == (becomes, token_axis)
    each = x.reshape(samples, -1) if x.numel() == found.numel() else x.reshape(1, -1).expand(samples, -1)
    assert torch.equal(found.reshape(samples, -1), each)


STRANGERS = {
    # case: (samples, numbers of tokens, shape, channels first)
    "a number for the whole batch": (2, {5}, (), False),
    "an expert's tokens, of any sample": (2, {5}, (7, 8), False),
    "an expert's tokens, by chance a multiple": (2, {5}, (6, 8), False),
    "an axis that is no multiple": (2, set(), (3, 4, 4), False),
    "channels first, and no multiple": (2, {5}, (3, 4, 4), True),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_tensor_without_the_rows_of_its_batch_is_refused(case):
    samples, lengths, shape, channels_first = STRANGERS[case]
    with pytest.raises(InfraError, match=r"of shape \(.*\) has no axis for the 2 samples .* set data.batch_size to 1"):
        BatchRows(list(range(samples)), frozenset(lengths)).shaped(torch.zeros(shape), channels_first)


IDS = torch.arange(10).reshape(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
DECODER = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("layer", "length", "indices"),
    [
        ("encoder.block.0", 5, [None, [2, 3, 4]]),
        ("encoder.block.0", 3, [None, None]),
        ("decoder.block.0", 3, [[0, 1], [0]]),
        ("decoder.block.0", 5, [None, None]),
        ("decoder.block.0.EncDecAttention.k", 5, [None, [2, 3, 4]]),
        ("decoder.layers.1.encoder_attn.v_proj", 5, [None, [2, 3, 4]]),
        ("decoder.layers.1.encoder_attn.q_proj", 3, [[0, 1], [0]]),
        ("lm_head", 3, [[0, 1], [0]]),
    ],
)
def test_padding_is_that_of_the_side_whose_tokens_a_layer_sees(layer, length, indices):
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "decoder_input_ids": IDS[:, :3],
        "decoder_attention_mask": DECODER,
    }
    rows = rows_of(batch, 0)
    assert rows.padded
    assert [None if row is None else row.tolist() for row in rows.unpadded(layer, length)] == indices


@pytest.mark.parametrize(
    ("batch", "samples", "lengths", "padded"),
    [
        (IDS, [3, 4], {5}, False),
        (torch.zeros(2, 5, 8), [3, 4], {5}, False),
        (torch.zeros(2, 8), [3, 4], set(), False),
        (torch.zeros(2, 3, 4, 4), [3, 4], set(), False),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, [3, 4], {5}, False),
        ({"input_ids": IDS, "attention_mask": MASK}, [3, 4], {5}, True),
        ({"pixel_values": torch.zeros(6, 3, 4, 4), "input_ids": IDS}, [3, 4], {5}, False),
        ({"inputs_embeds": torch.zeros(2, 7, 8)}, [3, 4], {7}, False),
        ({"pixel_values": torch.zeros(1, 3, 4, 4), "use_cache": False}, [3], set(), False),
    ],
    ids=[
        "ids", "embeddings", "features", "an image", "a mask without padding", "a mask with padding",
        "patches before ids", "embeddings by name", "pixels by name",
    ],
)  # fmt: skip
def test_a_batch_says_its_samples_and_its_numbers_of_tokens(batch, samples, lengths, padded):
    rows = rows_of(batch, 3)
    assert (rows.samples, rows.lengths, rows.padded) == (samples, lengths, padded)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"labels": None, "use_cache": False}, "holds no tensor"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 5, 5)}, "the attention_mask of a batch has the shape"),
    ],
)
def test_a_batch_that_says_no_rows_is_refused(batch, said):
    with pytest.raises(InfraError, match=said):
        rows_of(batch, 0)


@pytest.mark.parametrize(
    ("batch", "ids"),
    [(IDS, IDS.tolist()), ({"input_ids": IDS}, IDS.tolist()), ({"inputs_embeds": torch.zeros(2, 5, 8)}, [])],
    ids=["a tensor", "by name", "embeddings"],
)
def test_the_ids_of_each_row_are_those_of_the_batch(batch, ids):
    assert [row.tolist() for row in token_ids(batch)] == ids
