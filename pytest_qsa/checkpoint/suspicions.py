"""What is suspected of weights, in sentences: many layers that share a fault are one suspicion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..common import number
from .checks.repeats import equal_blocks
from .copies import Place, Resemblance, place_of, recognizer_of, resemblances
from .files import Files
from .folder import Settings, kind_of, natural
from .row_orders import heads_of

MOST_KINDS = 3
"""The number of kinds of layers that are counted one by one."""
MOST_NAMED = 3
MOST_LISTED = 6
SAME_FACTOR = 0.02
"""Two factors that differ by less than this are one, which rounding to few bits has moved."""
MOVED_ALIKE = (
    (("up_proj", "gate_proj"), "down_proj"),
    (("w3", "w1"), "w2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
)
"""The layers that write the neurons of a feed-forward layer, and the one that reads them."""
HEADS_MOVED = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The layers in which the heads of attention may be moved together."""
MANY = 4
"""The number of layers from which a summary says which they are."""


@dataclass(frozen=True)
class Suspicion:
    """A fault that was recognized. `what`: a sentence without a full stop; `layers`: the layers that it is about."""

    what: str
    layers: frozenset[str]


def suspicions_of(files: Files, layers: Iterable[str]) -> list[Suspicion]:
    """Return what the weights of some layers, and of all below them, are in the reference, if not their own.

    None where nothing was recognized; without a reference that is blocks which are equal. Where something was, all
    weights are looked at: which others share it says what happened. Those about the given layers come first, and of
    these the one about most.

    Raises:
        AnomalyError: a file is damaged.
        InfraError: a file is missing or can't be read.
    """
    if files.reference is None or files.relation.kind == "rotated":  # no weight alone is like one of the reference
        return [each for each in _equal_blocks(files) if each.layers & set(layers)]
    asked = frozenset(layer for layer, each in resemblances(files, layers).items() if each is not None)
    if not asked:
        return []
    every = list(recognizer_of(files).weights)
    found = resemblances(files, every)
    known = [each for each in found.values() if each is not None]
    undone = _undone(files, known)
    said = [*_harmless(undone)]
    known = [each for each in known if each.layer not in undone]
    said += [*_orders(known, every, len(found)), *_siblings(known, every, len(found)), *_experts(known)]
    # a smoothing folds factors into layers by design
    factors = _factors(known, every) if files.relation.kind != "smoothed" else ()
    said += [*_blocks(files, known, every), *factors, *_additions(known, every)]
    return sorted(said, key=lambda each: (each.layers.isdisjoint(asked), -len(each.layers)))


def _equal_blocks(files: Files) -> Iterator[Suspicion]:
    """Yield the blocks that repeat others to the last bit: `layers 15 to 29 are layers 0 to 14 to the last bit`."""
    sources: dict[str, dict[str, list[Place]]] = {}
    layers: dict[str, set[str]] = {}
    for first, *repeats in equal_blocks(files):
        source = place_of(first.layer)
        for own in map(place_of, (tensor.layer for tensor in repeats)):
            if own.rest == source.rest:
                sources.setdefault(own.before, {}).setdefault(f"{own.block} {source.block}", []).append(own)
                layers.setdefault(own.before, set()).update(
                    f"{own.before}{of}{own.rest}" for of in (own.block, source.block)
                )
    for before, pairs in sources.items():
        most = max(map(len, pairs.values()))
        moves = [tuple(map(int, pair.split())) for pair, own in pairs.items() if len(own) == most]
        blocks, others = ({move[side] for move in moves} for side in (0, 1))
        plural = len(blocks) > 1
        verb, noun = ("are", "layers") if plural else ("is", "layer")
        what = f"{noun} {_range(blocks)} {verb} {noun} {_range(others)} to the last bit"
        yield Suspicion(what, frozenset(layers[before]))


def by_kind(layers: Collection[str], among: Collection[str]) -> str:
    """Say which layers of many they are, by kind or by block; empty for a few, and where neither says more.

    `among`: all layers that were looked at.
    """
    counts, kinds = Counter(map(kind_of, layers)), Counter(map(kind_of, among))
    if len(layers) < MANY or len(layers) == len(among) or len(kinds) < 2:
        return ""
    if len(counts) <= MOST_KINDS:
        return f"{counted_kinds(layers, among)}, nothing else"
    blocks, every = ({place_of(layer).block for layer in names} - {""} for names in (layers, among))
    inside = [layer for layer in among if place_of(layer).block in blocks]
    if len(blocks) < len(every) and {*inside} == {*layers}:
        return f"all of {'layers' if len(blocks) > 1 else 'layer'} {_range({*map(int, blocks)})}, nothing else"
    return ""


def counted_kinds(layers: Collection[str], among: Collection[str]) -> str:
    """Write `30 of 30 q_proj and 30 of 30 k_proj`, or which of a kind; the name where it is one layer.

    Of many kinds `all 210 layers of 7 kinds`, or `50 of 210 layers of 7 kinds`. `among`: all layers that there are.
    """
    if len(layers) == 1:
        return next(iter(layers))
    if len(layers) == len(among):
        return f"all {len(among)} layers"
    counts, all_counts = (Counter(map(kind_of, names)) for names in (layers, among))
    if len(counts) > MOST_KINDS:
        whole = sum(all_counts[kind] for kind in counts)
        kinds = "" if len(counts) == len(all_counts) else f" of {len(counts)} kinds"
        return f"{f'all {whole}' if len(layers) == whole else f'{len(layers)} of {whole}'} layers{kinds}"
    which = [_which([layer for layer in layers if kind_of(layer) == kind], all_counts[kind]) for kind in counts]
    if len(set(which)) == 1:  # the same blocks of each kind are told once
        which = [""] * (len(which) - 1) + which[:1]
    parts = zip(counts.items(), which, strict=True)
    return joined([f"{count} of {all_counts[kind]} {_short(kind)}{where}" for (kind, count), where in parts])


def _which(layers: Sequence[str], of: int) -> str:
    """Write ` (layers 5, 12 and 20)` for a few of a kind, or a range of it; empty for all, and for many."""
    blocks = {int(place_of(layer).block or 0) for layer in layers}
    if len(layers) == of or len(blocks) < len(layers) or (len(blocks) > MOST_LISTED and not _is_range(blocks)):
        return ""
    return f" ({'layer' if len(blocks) == 1 else 'layers'} {_range(blocks)})"


def joined(texts: Sequence[str]) -> str:
    """Write `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def _short(kind: str) -> str:
    last = kind.rpartition(".")[2]
    return kind if last == "*" else f"{last} of experts" if ".experts." in kind else last


def _only(layers: Collection[str], odd: int) -> str:
    """Say that no other layer is unlike its own. `odd`: the number of those that are."""
    return ", nothing else" if len(layers) == odd > 1 else ""


def _orders(known: Sequence[Resemblance], every: Collection[str], odd: int) -> Iterator[Suspicion]:
    groups: dict[str, list[Resemblance]] = {}
    for each in known:
        if each.order is not None:
            groups.setdefault(each.order.name, []).append(each)
    for name, members in groups.items():
        layers = [each.layer for each in members]
        details = {each.order.detail for each in members if each.order is not None}
        detail = f" ({details.pop()})" if len(details) == 1 and details != {""} else ""
        what = f"{counted_kinds(layers, every)}{_only(layers, odd)}: {name}{detail}"
        yield Suspicion(what, frozenset(layers))


def _undone(files: Files, known: Sequence[Resemblance]) -> set[str]:
    """Return the layers whose rows or columns are in another order that the other layers of their block undo.

    These are the neurons of a feed-forward layer, moved alike in what writes them and what reads them, and the heads
    of attention, moved alike in all four matrices.
    """
    moved = {each.layer: each for each in known if each.places}
    found: set[str] = set()
    for layer in moved:
        stem, dot, last = layer.rpartition(".")
        for writers, reader in MOVED_ALIKE:
            names = [f"{stem}{dot}{name}" for name in (*writers, reader)]
            alike = last == reader and all(name in moved for name in names)
            if alike and len({moved[name].places for name in names}) == 1:
                found |= {*names}
        heads = [f"{stem}{dot}{name}" for name in HEADS_MOVED]
        if last == HEADS_MOVED[0] and all(name in moved for name in heads):
            queries, keys, values, output = (moved[name].places for name in heads)
            same = keys == values and queries == output
            if same and queries == _of_readers(files.folder.text_config, keys, len(queries) // len(keys)):
                found |= {*heads}
    return found


def _of_readers(settings: Settings, keys: Sequence[int], several: int) -> Sequence[int]:
    """Return the order of the rows of queries that follows that of keys, of which a head is read by several."""
    head = heads_of(settings, len(keys)) or 1
    size = several * head
    return tuple(key // head * size + row for key in keys[::head] for row in range(size))


def _harmless(layers: Collection[str]) -> Iterator[Suspicion]:
    """Yield the orders that blocks undo, those of the same layers together."""
    kinds: dict[str, set[str]] = {}
    for layer in layers:
        kinds.setdefault(place_of(layer).block, set()).add(_short(kind_of(layer)))
    groups: dict[tuple[str, ...], set[int]] = {}
    for block, moved in kinds.items():
        groups.setdefault(tuple(sorted(moved)), set()).add(int(block or 0))
    for names, blocks in groups.items():
        where = f"in {'layers' if len(blocks) > 1 else 'layer'} {_range(blocks)}"
        what = f"{where} the rows or columns of {joined(names)} are in another order, alike in all"
        yield Suspicion(f"{what}: the model computes the same", frozenset(layers))


def _siblings(known: Sequence[Resemblance], every: Collection[str], odd: int) -> Iterator[Suspicion]:
    """Yield the layers that are another one of their block: `gate_proj is the reference's up_proj`."""
    groups: dict[tuple[str, str], list[Resemblance]] = {}
    for each in known:
        own, source = place_of(each.layer), place_of(each.source)
        if each.source != each.layer and own.block == source.block and kind_of(own.rest) != kind_of(source.rest):
            groups.setdefault((_short(kind_of(own.rest)), _short(kind_of(source.rest))), []).append(each)
    for (own_kind, source_kind), members in groups.items():
        layers = [each.layer for each in members]
        back = [each.layer for each in groups.get((source_kind, own_kind), [])]
        if back and {place_of(layer).block for layer in back} == {place_of(layer).block for layer in layers}:
            if own_kind < source_kind:
                both = [*layers, *back]
                what = f"{counted_kinds(both, every)}{_only(both, odd)}: exchanged, each is the reference's other one"
                yield Suspicion(what, frozenset(both))
        else:
            verb = "is" if len(layers) == 1 else "are"
            theirs = "" if len(layers) == 1 else " of their block"
            what = f"{counted_kinds(layers, every)} {verb} the reference's {source_kind}{theirs}"
            yield Suspicion(what, frozenset(layers))


def _experts(known: Sequence[Resemblance]) -> Iterator[Suspicion]:
    """Yield experts that are others of their layer, as where they were sorted by name."""
    moves: dict[str, str] = {}
    layers: list[str] = []
    for each in known:
        own, source = place_of(each.layer), place_of(each.source)
        if each.source != each.layer and own.block == source.block and kind_of(own.rest) == kind_of(source.rest):
            inner, other = (place_of(place.rest) for place in (own, source))
            moves.setdefault(inner.block, other.block)
            layers.append(each.layer)
    if not layers:
        return
    blocks = {place_of(layer).block for layer in layers}
    where = f"in layer {blocks.pop()}" if len(blocks) == 1 else f"in {len(blocks)} layers"
    yield Suspicion(f"{where} {_moves(moves, 'expert')}", frozenset(layers))


def _moves(moves: Mapping[str, str], noun: str) -> str:
    """Write `expert 2 is the reference's expert 10, …`, and whether that is the order of the numbers as text."""
    order = sorted(moves, key=natural)
    text = ", ".join(f"{noun} {each} is the reference's {noun} {moves[each]}" for each in order[:MOST_NAMED])
    more = f" and {len(order) - MOST_NAMED} more" if len(order) > MOST_NAMED else ""
    count = max(int(each) for each in (*moves, *moves.values())) + 1
    as_text = sorted(map(str, range(count)))
    sorted_so = all(as_text[int(each)] == source for each, source in moves.items()) and len(moves) > 1
    return f"{text}{more}{': sorted as text, 0, 1, 10, 11, …' if sorted_so else ''}"


def _blocks(files: Files, known: Sequence[Resemblance], every: Collection[str]) -> Iterator[Suspicion]:
    """Yield blocks that are other ones: `layers 15 to 29 repeat layers 0 to 14`."""
    groups: dict[tuple[str, int], list[tuple[Place, str, str]]] = {}
    for each in known:
        own, source = place_of(each.layer), place_of(each.source)
        if each.source != each.layer and own.rest == source.rest:
            shift = int(source.block) - int(own.block)
            groups.setdefault((own.before, shift), []).append((own, each.layer, each.source))
    moved = {own.block: place_of(source).block for members in groups.values() for own, _, source in members}
    if len(groups) > MOST_NAMED:
        layers = frozenset(layer for members in groups.values() for _, layer, _ in members)
        yield Suspicion(_moves(moved, "layer"), layers)
        return
    for members in groups.values():
        blocks, sources = ({*map(int, numbers)} for numbers in (
            (own.block for own, _, _ in members), (place_of(source).block for _, _, source in members)
        ))  # fmt: skip
        rests = {own.rest for own, _, _ in members}
        whole = len(rests) >= len({place_of(layer).rest for layer in every if place_of(layer).block in moved})
        whole |= len(rests) > MOST_KINDS
        parts = "" if whole else f" in {joined(sorted(rest.rpartition('.')[2] for rest in rests))}"
        plural = len(blocks) > 1
        noun = "layers" if plural else "layer"
        kept = [recognizer_of(files).find(source) if source in every else None for _, _, source in members]
        repeats = all(each is not None and each.own for each in kept)
        verb = f"repeat{'' if plural else 's'}" if repeats else f"{'are' if plural else 'is'} the reference's"
        what = f"{noun} {_range(blocks)} {verb} {noun} {_range(sources)}{parts}"
        yield Suspicion(what, frozenset(layer for _, layer, _ in members))


def _range(numbers: Collection[int]) -> str:
    if _is_range(numbers):
        return f"{min(numbers)} to {max(numbers)}"
    shown = [str(each) for each in sorted(numbers)]
    return joined(shown if len(shown) <= MOST_LISTED else [*shown[:5], f"{len(shown) - 5} more"])


def _is_range(numbers: Collection[int]) -> bool:
    return len(numbers) > 2 and max(numbers) - min(numbers) + 1 == len(numbers)


def _factors(known: Sequence[Resemblance], every: Collection[str]) -> Iterator[Suspicion]:
    scaled = [each for each in known if each.factor != 1 and each.source == each.layer and each.order is None]
    groups: list[list[Resemblance]] = []
    for each in sorted(scaled, key=lambda each: each.factor):
        if groups and abs(each.factor / groups[-1][0].factor - 1) <= SAME_FACTOR:
            groups[-1].append(each)
        else:
            groups.append([each])
    for members in groups:
        layers = [each.layer for each in members]
        factors = [each.factor for each in members]
        # no more digits than they have in common
        digits = 3 if factors[-1] - factors[0] <= 1e-3 * abs(factors[0]) else 2
        factor = number(float(f"{factors[len(factors) // 2]:.{digits}g}"))
        verb = "is" if len(layers) == 1 else "are"
        what = f"{counted_kinds(layers, every)} {verb} {factor} × the reference's and otherwise the same"
        yield Suspicion(what, frozenset(layers))


def _additions(known: Sequence[Resemblance], every: Collection[str]) -> Iterator[Suspicion]:
    """Yield the layers that differ from their own by few dimensions; in coarse codes others may do so unseen."""
    ranks = {each.layer: each.rank for each in known if each.rank}
    if ranks:
        least, most = min(ranks.values()), max(ranks.values())
        rank = str(most) if least == most else f"{least} to {most}"
        verb = "differs" if len(ranks) == 1 else "differ"
        what = f"{verb} from the reference's by a matrix of rank {rank}, as of an adapter that one of both has merged"
        yield Suspicion(f"{counted_kinds(ranks, every)}: {what}, or with another factor", frozenset(ranks))
