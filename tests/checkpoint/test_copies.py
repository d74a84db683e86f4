"""Weights that are the reference's, but moved or times a factor, are called what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_qsa.checkpoint.checks.health import problems_of
from pytest_qsa.checkpoint.files import Files
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.checkpoint.row_orders import named_order
from pytest_qsa.checkpoint.suspicions import by_kind, counted_kinds, suspicions_of
from pytest_qsa.checkpoint.weights import stored_weights
from pytest_qsa.verdicts.budgets import budget_of
from pytest_qsa.verdicts.judge import judge_problems
from support.checkpoints import edited, save_llama, save_quantized_llama, save_quantized_moe

LAYERS = 4


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Save a Llama of 4 heads of 16, 2 of them for keys, in 4 layers."""
    return save_llama(tmp_path_factory.mktemp("copies") / "original", tokenizer=False, layers=LAYERS, width=64)


def said(folder, reference, layers=None):
    files = Files(open_folder(folder), open_folder(reference))
    return [each.what for each in suspicions_of(files, stored_weights(files) if layers is None else layers)]


def noisy(change):
    """Return a change that also rounds every matrix, as 4 bits would."""

    def changed(weights):
        change(weights)
        for tensor in weights.values():
            if tensor.dim() == 2:
                scale = tensor.abs().amax(1, keepdim=True) / 7
                tensor.copy_((tensor / scale).round() * scale)

    return changed


def each(names, function):
    def change(weights):
        for name, tensor in weights.items():
            if any(f".{each}." in name for each in names):
                tensor.copy_(function(tensor.clone()))

    return change


def of_layer(layer, name, function):
    return lambda weights: weights[f"model.layers.{layer}.{name}.weight"].copy_(
        function(weights[f"model.layers.{layer}.{name}.weight"].clone())
    )


def alternating(weight, head=16):
    """Return rows in Llama's original layout, as `permute` of convert_llama_weights_to_hf.py reverts it."""
    return weight.view(-1, 2, head // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def exchanged(weights):
    for layer in range(LAYERS):
        gate, up = (weights[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        kept = gate.clone()
        gate.copy_(up)
        up.copy_(kept)


def repeated(weights):
    for name, tensor in weights.items():
        for later, earlier in ((2, 0), (3, 1)):
            if name.startswith(f"model.layers.{later}."):
                tensor.copy_(weights[name.replace(f"layers.{later}.", f"layers.{earlier}.")])


def shifted(weights):
    for layer in reversed(range(1, LAYERS)):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        weights[name].copy_(weights[name.replace(f"layers.{layer}.", f"layers.{layer - 1}.")].clone())


FAULTS = {
    "rope": (
        each(["q_proj", "k_proj"], alternating),
        "4 of 4 k_proj and 4 of 4 q_proj, nothing else: rows in the rope's interleaved layout",
    ),
    "rope back": (
        each(["q_proj"], lambda weight: weight.view(-1, 8, 2, 64).transpose(1, 2).reshape(weight.shape)),
        "4 of 4 q_proj, nothing else: rows in the rope's layout of halves, where the reference's are interleaved",
    ),
    "rope with the heads of the queries": (
        each(["k_proj"], lambda weight: alternating(weight).view(1, -1, 2, 64).transpose(1, 2).reshape(weight.shape)),
        "4 of 4 k_proj, nothing else: rows as a conversion of the rope's layout leaves them with heads of 32 rows "
        "(not 16)",
    ),
    "heads": (
        of_layer(2, "self_attn.q_proj", lambda weight: weight.view(4, 16, 64)[[1, 2, 0, 3]].reshape(64, 64)),
        "model.layers.2.self_attn.q_proj: heads in another order (1, 2, 0, 3)",
    ),
    "halves": (
        of_layer(2, "mlp.up_proj", lambda weight: weight.roll(32, 0)),
        "model.layers.2.mlp.up_proj: its two halves exchanged",
    ),
    "columns": (
        of_layer(1, "mlp.down_proj", lambda weight: weight[:, np.random.default_rng(0).permutation(64)]),
        "model.layers.1.mlp.down_proj: columns in another order",
    ),
    "transposed": (
        of_layer(1, "self_attn.o_proj", lambda weight: weight.T),
        "model.layers.1.self_attn.o_proj: transposed",
    ),
    "gate and up": (
        exchanged,
        "4 of 4 gate_proj and 4 of 4 up_proj, nothing else: exchanged, each is the reference's other one",
    ),
    "pipeline stage": (repeated, "layers 2 and 3 repeat layers 0 and 1"),
    "factor": (
        each(["down_proj"], lambda weight: 2 * weight),
        "4 of 4 down_proj are 2 × the reference's and otherwise the same",
    ),
    "another sign": (
        of_layer(2, "mlp.up_proj", lambda weight: -weight),
        "model.layers.2.mlp.up_proj is -1 × the reference's and otherwise the same",
    ),
    "one factor throughout": (
        each(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], lambda weight: weight / 2),
        "all 28 layers of 7 kinds are 0.5 × the reference's and otherwise the same",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_weight_that_was_moved_is_called_what_it_is(original, tmp_path, fault):
    change, expected = FAULTS[fault]
    assert said(edited(original, tmp_path / "moved", noisy(change)), original) == [expected]


def neurons(weights, reader="down_proj"):
    order = torch.from_numpy(np.random.default_rng(0).permutation(64))
    for name in ("up_proj", "gate_proj"):
        weights[f"model.layers.2.mlp.{name}.weight"] = weights[f"model.layers.2.mlp.{name}.weight"][order]
    down = weights[f"model.layers.2.mlp.{reader}.weight"]
    down.copy_(down[:, order if reader == "down_proj" else slice(None)])


def heads_of_a_block(weights, queries=(2, 3, 0, 1)):
    for name, order in (("q", queries), ("k", (1, 0)), ("v", (1, 0)), ("o", queries)):
        weight = weights[f"model.layers.2.self_attn.{name}_proj.weight"]
        turned = weight.T if name == "o" else weight
        turned = turned.reshape(len(order), 16, -1)[list(order)].reshape(turned.shape)
        weight.copy_((turned.T if name == "o" else turned).clone())


@pytest.mark.parametrize(
    ("change", "kinds"),
    [(neurons, "down_proj, gate_proj and up_proj"), (heads_of_a_block, "k_proj, o_proj, q_proj and v_proj")],
)
def test_an_order_that_a_block_undoes_is_called_harmless(original, tmp_path, change, kinds):
    what = f"in layer 2 the rows or columns of {kinds} are in another order, alike in all: the model computes the same"
    assert said(edited(original, tmp_path / "moved", noisy(change)), original) == [what]


@pytest.mark.parametrize(
    "change",
    [lambda weights: neurons(weights, "gate_proj"), lambda weights: heads_of_a_block(weights, (3, 2, 0, 1))],
)
def test_an_order_that_one_layer_of_a_block_does_not_follow_is_a_fault(original, tmp_path, change):
    found = said(edited(original, tmp_path / "moved", noisy(change)), original)
    assert found
    assert not any("computes the same" in each for each in found)


def test_layers_that_are_all_one_too_late_repeat_nothing(original, tmp_path):
    told = said(edited(original, tmp_path / "shifted", shifted), original)
    assert told == ["layers 1 to 3 are the reference's layers 0 to 2 in o_proj"]


def test_what_one_of_the_layers_asked_for_is_is_said_of_all_that_are(original, tmp_path):
    def change(weights):
        each(["k_proj"], alternating)(weights)
        each(["0.mlp.up_proj"], lambda weight: 2 * weight)(weights)

    folder = edited(original, tmp_path / "rope", change)
    rows = "4 of 4 k_proj: rows in the rope's interleaved layout"
    factor = "model.layers.0.mlp.up_proj is 2 × the reference's and otherwise the same"
    assert said(folder, original, ["model.layers.3"]) == [rows, factor]
    assert said(folder, original, ["model.layers.0.mlp"]) == [factor, rows]
    assert said(folder, original, ["model.layers.3.mlp"]) == []


@pytest.mark.parametrize("rank", [4, 16])
def test_an_adapter_that_is_merged_is_known_by_the_rank_of_the_difference(tmp_path, rank):
    original = save_llama(tmp_path / "original", tokenizer=False, layers=LAYERS, width=256)
    random = np.random.default_rng(0)

    def merge(weight):
        up, down = random.normal(size=(len(weight), rank)), random.normal(size=(rank, weight.shape[1]))
        added = torch.from_numpy(up @ down).float()
        return weight + added * (0.2 * weight.std() / added.std())

    for name, change in {"rounded": noisy(each(["q_proj"], merge)), "exact": each(["q_proj"], merge)}.items():
        assert said(edited(original, tmp_path / name, change), original) == [
            f"4 of 4 q_proj: differ from the reference's by a matrix of rank {rank}, as of an adapter that "
            "one of both has merged, or with another factor"
        ]


def test_a_zero_point_that_is_off_is_no_adapter(original, tmp_path):
    def shift(weight):
        return (weight.view(-1, 16) + 0.2 * weight.view(-1, 16).abs().amax(1, keepdim=True)).view(weight.shape)

    assert said(edited(original, tmp_path / "shifted", noisy(each(["q_proj"], shift))), original) == []


def test_a_few_rows_that_are_wrong_are_no_adapter(original, tmp_path):
    def zeroed(weight):
        weight[:3] = 0
        return weight

    assert said(edited(original, tmp_path / "rows", of_layer(2, "mlp.up_proj", zeroed)), original) == []


def test_a_few_of_a_kind_are_named_by_their_blocks():
    every = [f"model.layers.{block}.{kind}" for block in range(30) for kind in ("q_proj", "k_proj", "v_proj", "o_proj")]

    def named(blocks, *kinds):
        return counted_kinds([f"model.layers.{block}.{kind}" for block in blocks for kind in kinds], every)

    assert named([5, 12, 20], "q_proj") == "3 of 30 q_proj (layers 5, 12 and 20)"
    assert named(range(15, 30), "q_proj") == "15 of 30 q_proj (layers 15 to 29)"
    assert named([3], "q_proj", "k_proj") == "1 of 30 q_proj and 1 of 30 k_proj (layer 3)"
    assert named(range(0, 20, 2), "q_proj") == "10 of 30 q_proj"
    assert named(range(30), "q_proj") == "30 of 30 q_proj"
    kinds = ("a_proj", "b_proj", "c_proj", "d_proj")
    more = [f"model.layers.{block}.{kind}" for block in range(2) for kind in kinds]
    assert counted_kinds(more, [*more, "model.norm"]) == "all 8 layers of 4 kinds"
    assert counted_kinds(more[1:], [*more, "model.norm"]) == "7 of 8 layers of 4 kinds"


def test_what_is_healthy_or_only_damaged_is_like_nothing_else(original, tmp_path):
    assert said(original, original) == []
    assert said(edited(original, tmp_path / "int4", noisy(lambda weights: None)), original) == []
    noise = np.random.default_rng(1).normal(size=(64, 64)).astype("f4")
    random = edited(original, tmp_path / "random", of_layer(1, "self_attn.o_proj", lambda w: torch.from_numpy(noise)))
    assert said(random, original) == []


def test_what_the_reference_repeats_too_is_nothing(original, tmp_path):
    shared = edited(original, tmp_path / "shared", repeated)
    assert said(edited(shared, tmp_path / "int4", noisy(lambda weights: None)), shared) == []


def test_experts_in_another_order_are_named(tmp_path):
    experts = save_quantized_moe(tmp_path / "moe", "W8A8")

    def moved(weights):
        kept = {name: tensor.clone() for name, tensor in weights.items()}
        for name in kept:
            if ".experts.1." in name:
                other = name.replace(".experts.1.", ".experts.3.")
                weights[name], weights[other] = kept[other], kept[name]

    folder = edited(experts, tmp_path / "moved", moved)
    assert said(folder, tmp_path / "moe-float") == [
        "in 2 layers expert 1 is the reference's expert 3, expert 3 is the reference's expert 1"
    ]
    assert said(experts, tmp_path / "moe-float") == []


def test_partly_turned_heads_and_larger_blocks_have_names():
    partial = np.concatenate([head + np.array([0, 2, 1, 3, 4, 5, 6, 7]) for head in (0, 8)])
    assert named_order(partial, 8, "rows").name == "rows in the rope's interleaved layout"
    assert named_order(np.array([4, 5, 0, 1, 2, 3]), 0, "rows") == ("blocks of 2 rows in another order", "2, 0, 1")


def test_many_layers_are_summed_up_by_kind_or_by_block():
    every = [f"layers.{layer}.{name}_proj" for layer in range(6) for name in ("q", "k", "v", "o", "up")]
    keys = [layer for layer in every if ".k_proj" in layer]
    assert by_kind(keys, every) == "6 of 6 k_proj, nothing else"
    assert by_kind([layer for layer in every if layer[7] in "45"], every) == "all of layers 4 and 5, nothing else"
    assert by_kind(keys[:2], every) == by_kind(every, every) == ""


def repeats(folder, reference=None):
    files = Files(open_folder(folder), open_folder(reference) if reference else None)
    found = problems_of(files, "checkpoint_weights")[1]
    return {each.layer: each for each in found if "to the last bit" in each.what}


def test_a_layer_that_was_written_over_another_is_found_from_the_files_alone(original, tmp_path):
    folder = edited(original, tmp_path / "repeated", repeated)
    found = repeats(folder, original)
    assert {layer.split(".")[2] for layer in found} == {"2", "3"}
    assert len(found) == 14
    first = found["model.layers.2.self_attn.q_proj"]
    assert (
        first.what
        == "the weight of model.layers.0.self_attn.q_proj to the last bit, and the reference's is another one"
    )
    assert not first.note


def test_what_the_reference_repeats_too_is_nothing_and_without_a_reference_it_is_one_note(original, tmp_path):
    deeper = edited(original, tmp_path / "deeper", repeated)
    again = edited(deeper, tmp_path / "again", lambda weights: None)
    assert repeats(again, deeper) == {}
    (note,) = repeats(deeper).values()
    assert note.note
    assert note.what.endswith("to the last bit, and 13 more repeat one")


def test_matrices_of_zeros_and_a_tied_head_that_is_written_repeat_nothing(original, tmp_path):
    def pruned(weights):
        for layer in (1, 2):
            weights[f"model.layers.{layer}.mlp.up_proj.weight"].zero_()

    def written(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    assert repeats(edited(original, tmp_path / "pruned", pruned), original) == {}
    tied = edited(original, tmp_path / "tied", written)
    assert repeats(tied) == repeats(edited(tied, tmp_path / "again", lambda weights: None), tied) == {}
    assert set(repeats(tied, original)) == {"lm_head"}  # the original's is another one


def test_matrices_of_zeros_repeat_nothing_without_a_reference_either(original, tmp_path):
    def pruned(weights):
        for layer in (1, 2):
            weights[f"model.layers.{layer}.mlp.up_proj.weight"].zero_()

    assert repeats(edited(original, tmp_path / "pruned", pruned)) == {}


def test_a_layer_that_is_another_but_for_one_row_is_not_called_equal_to_the_last_bit(original, tmp_path):
    def almost(weights):
        of_layer(2, "self_attn.q_proj", lambda _: weights["model.layers.0.self_attn.q_proj.weight"].clone())(weights)
        weights["model.layers.2.self_attn.q_proj.weight"][24] += 1

    assert repeats(edited(original, tmp_path / "almost", almost), original) == {}


def test_a_repeat_of_the_reference_whose_scale_is_damaged_is_not_called_written_over(quantized, llama, tmp_path):
    up, later = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"

    def deeper(weights):
        for part in ("weight", "weight_scale"):
            if f"{up}.{part}" in weights:
                weights[f"{later}.{part}"].copy_(weights[f"{up}.{part}"])

    def damaged(weights):
        deeper(weights)
        weights[f"{later}.weight_scale"] *= 2

    reference = edited(llama, tmp_path / "reference", deeper)
    assert repeats(edited(quantized["int8"], tmp_path / "damaged", damaged), reference) == {}
    assert set(repeats(edited(quantized["int8"], tmp_path / "copied", deeper), llama)) == {later}


@pytest.fixture(scope="module")
def repeating(original, tmp_path_factory):
    """Return an int8 model whose last two layers were written over by the first two."""
    base = tmp_path_factory.mktemp("repeating")
    return edited(save_quantized_llama(base / "int8", original), base / "repeating", copied_over)


def copied_over(weights):
    for name in weights:
        for later, earlier in ((2, 0), (3, 1)):
            if name.startswith(f"model.layers.{later}."):
                weights[name] = weights[name.replace(f"layers.{later}.", f"layers.{earlier}.")].clone()


def test_blocks_that_are_equal_are_named_first_without_a_reference(repeating, tmp_path):
    folder = edited(repeating, tmp_path / "odd", of_layer_scale(1, 8))
    files = Files(open_folder(folder))
    series, found = problems_of(files, "checkpoint_health")
    assert {each.layer for each in found if not each.note} == {"model.layers.1.mlp.up_proj"}
    headline = judge_problems(series, found, budget_of({"max": 0}, series.layers, None), files).headline
    assert headline.startswith("layers 2 and 3 are layers 0 and 1 to the last bit; 1 problem in 1 of ")
    assert suspicions_of(Files(open_folder(repeating)), ["lm_head"]) == []


def of_layer_scale(layer, factor):
    return lambda weights: weights[f"model.layers.{layer}.mlp.up_proj.weight_scale"].mul_(factor)


def test_a_layer_that_is_a_copy_is_one_problem_though_its_size_is_another_too(original, tmp_path):
    larger = edited(original, tmp_path / "larger", of_layer(0, "mlp.up_proj", lambda weight: weight * 8))
    copies = edited(save_quantized_llama(tmp_path / "int8", larger), tmp_path / "copies", copied_over)
    found = problems_of(Files(open_folder(copies), open_folder(larger)), "checkpoint_health")[1]
    assert [
        each.what.partition(" to the last bit")[0] for each in found if each.layer == "model.layers.2.mlp.up_proj"
    ] == ["the weight of model.layers.0.mlp.up_proj"]
    sizes = problems_of(Files(open_folder(copies), open_folder(larger)), "checkpoint_scales")[1]
    assert "model.layers.2.mlp.up_proj" in {each.layer for each in sizes}


def test_a_weight_that_is_not_finite_is_like_no_other_one(original, tmp_path):
    """Its difference from the reference has no rank: no eigenvalue can be computed of it."""

    def change(weights):
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan

    folder = edited(original, tmp_path / "nan", noisy(change))
    assert said(folder, original, ["model.layers.1.mlp.down_proj"]) == []
