"""Calibrated bounds → the text of a suite with them written in; comments and layout stay as their author has them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from .calibration import Proposal

REMARK = re.compile(r"[ \t]*# calibrated: [^\r\n]*")
"""What an earlier calibration wrote behind its figures."""
Edit = tuple[int, int, str]


def calibrated(text: str, proposals: Mapping[str, Sequence[Proposal]], data: str) -> tuple[str, list[str]]:
    """Write proposals, by the id of their assertion, into a suite's text. `data`: in words, what was measured on.

    Returns the text, and the ids of those assertions whose bounds don't stand in it: in a base, in `defaults`, behind
    an alias.
    """
    entries = _assertions(yaml.compose(text, yaml.SafeLoader))
    edits: list[Edit] = []
    left = []
    for name, own in proposals.items():
        entry = entries.get(name)
        found = _edits(text, entry, own, data) if entry is not None else None
        if found is None:
            left.append(name)
        else:
            edits += found
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text, left


def noise_text(proposals: Sequence[Proposal]) -> str:
    """Return the value of the key `noise`, on one line."""
    sides: dict[str, list[str]] = {}
    for each in proposals:
        noise = each.noise
        figures = f"{{mean: {noise.mean:g}, sigma: {noise.sigma:g}, n: {noise.n}, k: {noise.k:g}}}"
        group = yaml.safe_dump([each.group], default_flow_style=True, width=1 << 20).strip()[1:-1]
        sides.setdefault(each.side, []).append(f"{group}: {figures}" if each.group else figures)
    values = {
        side: f"{{{', '.join(own)}}}" if any(each.group for each in proposals if each.side == side) else own[0]
        for side, own in sides.items()
    }
    return f"{{{', '.join(f'{side}: {value}' for side, value in values.items())}}}"


def remark_text(proposals: Sequence[Proposal], data: str) -> str:
    """Return the comment behind the noise: which layers decide, and on what they were measured."""
    layers = list(dict.fromkeys(each.layer for each in proposals))
    more = f" and {len(layers) - 2} more" if len(layers) > 2 else ""
    return f"# calibrated: {', '.join(layers[:2])}{more}, {data}"


def _assertions(root: yaml.Node | None) -> dict[str, yaml.MappingNode]:
    """Return the assertions that stand in a document, in either form, by id; none that an alias shares."""
    node = _values(root).get("assertions")
    found = _values(node)
    if isinstance(node, yaml.SequenceNode):
        found = {str(_values(entry)["id"].value): entry for entry in node.value if "id" in _values(entry)}
    entries = list(found.values())
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, yaml.MappingNode)
        and entries.count(entry) == 1
        and entry.start_mark.index > _values(root)["assertions"].start_mark.index
    }


def _values(node: yaml.Node | None) -> dict[str, yaml.Node]:
    return {str(key.value): value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def _edits(text: str, entry: yaml.MappingNode, proposals: Sequence[Proposal], data: str) -> list[Edit] | None:
    """Return the edits of one assertion; None where one of its bounds doesn't stand in it."""
    keys = _values(entry)
    edits: list[Edit] = []
    for each in proposals:
        bound = keys.get(each.side)
        number = _values(bound).get(each.group) if each.group else bound
        if number is None or not entry.start_mark.index <= number.start_mark.index < _end(entry):
            return None
        if each.proposed != each.bound:
            edits.append((number.start_mark.index, number.end_mark.index, f"{each.proposed:g}"))
    noise = noise_text(proposals)
    remark = "" if entry.flow_style else f"  {remark_text(proposals, data)}"
    if "noise" in keys:
        start, end = keys["noise"].start_mark.index, _end(keys["noise"])
        old = REMARK.match(text, end)
        return [*edits, (start, old.end() if old else end, f"{noise}{remark}")]
    last = max(_end(keys[each.side]) for each in proposals)
    if entry.flow_style:
        return [*edits, (last, last, f", noise: {noise}")]
    at = _line_end(text, last)
    newline = "\r\n" if text[at : at + 1] == "\r" else "\n"
    indent = " " * entry.value[0][0].start_mark.column
    return [*edits, (at, at, f"{newline}{indent}noise: {noise}{remark}")]


def _end(node: yaml.Node) -> int:
    """Return where a node's text ends; a block's own mark is where the next thing begins."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _line_end(text: str, index: int) -> int:
    found = re.compile(r"\r?\n|\Z").search(text, index)
    assert found is not None
    return found.start()
