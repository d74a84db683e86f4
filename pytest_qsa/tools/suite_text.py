"""The text of a suite: calibrated bounds and their noise written into it; its comments and its layout stay."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from .calibrate import Proposal

REMARK = re.compile(r"[ \t]*# calibrated: [^\r\n]*")
"""The comment of an earlier calibration, which a new one replaces."""
Edit = tuple[int, int, str]


def calibrated(text: str, proposals: Mapping[str, Sequence[Proposal]], data: str) -> tuple[str, list[str]]:
    """Write proposals, by the id of their assertion, into a suite's text. `data`: what was measured, in words.

    Return the new text, and the ids of the assertions whose bounds are not in this text: they are in a base, in
    `defaults` or behind an alias.
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
    for start, end, new in sorted(edits, reverse=True):  # from the end, so that earlier offsets stay right
        text = text[:start] + new + text[end:]
    return text, left


def noise_text(proposals: Sequence[Proposal]) -> str:
    """Return the value of the key `noise` on one line."""
    parts = []
    for side, figures in _figures(proposals).items():
        groups = ", ".join(f"{flow_yaml(group)}: {text}" for group, text in figures.items())
        parts.append(f"{side}: {figures.get('', f'{{{groups}}}')}")
    return f"{{{', '.join(parts)}}}"


def noise_lines(proposals: Sequence[Proposal], indent: str, newline: str) -> str:
    """Return the value of the key `noise` with a line for each group."""
    lines = []
    for side, figures in _figures(proposals).items():
        if "" in figures:
            lines.append(f"{indent}{side}: {figures['']}")
        else:
            groups = [f"{indent}  {flow_yaml(group)}: {text}" for group, text in figures.items()]
            lines += [f"{indent}{side}:", *groups]
    return newline.join(lines)


def _figures(proposals: Sequence[Proposal]) -> dict[str, dict[str, str]]:
    """Return the noise as YAML by side and group; a bound of all layers has the empty group."""
    figures: dict[str, dict[str, str]] = {}
    for each in proposals:
        noise = each.noise
        room = f", room: {noise.room:g}" if noise.room else ""
        room += f", over: {noise.over}" if noise.over != "parts" else ""
        text = f"{{mean: {noise.mean:g}, sigma: {noise.sigma:g}, n: {noise.n}, k: {noise.k:g}{room}}}"
        figures.setdefault(each.side, {})[each.group] = text
    return figures


def flow_yaml(value: Any) -> str:
    """Return a value in YAML's flow style, on one line."""
    # In a list, for a plain value on its own would get an end-of-document mark.
    return yaml.safe_dump([value], default_flow_style=True, width=1 << 20, sort_keys=False).strip()[1:-1]


def remark_text(proposals: Sequence[Proposal], data: str) -> str:
    """Return the comment on the noise: which layers decide, and on what data."""
    layers = list(dict.fromkeys(each.layer for each in proposals))
    more = f" and {len(layers) - 2} more" if len(layers) > 2 else ""
    return f"# calibrated: {', '.join(layers[:2])}{more}, {data}"


def _assertions(root: yaml.Node | None) -> dict[str, yaml.MappingNode]:
    """Return the assertions of a document, in either form, by id; without those that an alias shares."""
    node = _values(root).get("assertions")
    found = _values(node)
    if isinstance(node, yaml.SequenceNode):
        found = {str(_values(entry)["id"].value): entry for entry in node.value if "id" in _values(entry)}
    entries = list(found.values())
    # An alias is the same node twice: an edit of one assertion would be an edit of the other as well.
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
    """Return the edits of one assertion; None where one of its bounds is not in its own text."""
    keys = _values(entry)
    edits: list[Edit] = []
    for each in proposals:
        bound = keys.get(each.side)
        number = _values(bound).get(each.group) if each.group else bound
        if number is None or not entry.start_mark.index <= number.start_mark.index < _end(entry):
            return None
        if each.proposed != each.bound:
            edits.append((number.start_mark.index, number.end_mark.index, f"{each.proposed:g}"))
    if "noise" in keys:  # of an earlier calibration, with its comment
        key = next(key for key, _ in entry.value if key.value == "noise")
        start, end = key.end_mark.index, _end(keys["noise"])
        old = REMARK.match(text, end)
        return [*edits, (start, old.end() if old else end, _noise(text, entry, proposals, data))]
    last = max(_end(keys[each.side]) for each in proposals)
    if entry.flow_style:
        return [*edits, (last, last, f", noise{_noise(text, entry, proposals, data)}")]
    at = _line_end(text, last)
    indent = " " * entry.value[0][0].start_mark.column
    return [*edits, (at, at, f"{_newline(text, at)}{indent}noise{_noise(text, entry, proposals, data)}")]


def _noise(text: str, entry: yaml.MappingNode, proposals: Sequence[Proposal], data: str) -> str:
    """Return the text after the key `noise`: in block style, each group has a line of its own."""
    if entry.flow_style:
        return f": {noise_text(proposals)}"
    remark = remark_text(proposals, data)
    if not any(each.group for each in proposals):
        return f": {noise_text(proposals)}  {remark}"
    newline = _newline(text, _line_end(text, entry.start_mark.index))
    indent = " " * (entry.value[0][0].start_mark.column + 2)
    return f":  {remark}{newline}{noise_lines(proposals, indent, newline)}"


def _newline(text: str, at: int) -> str:
    # The file keeps its own line ends.
    return "\r\n" if text[at : at + 1] == "\r" else "\n"


def _end(node: yaml.Node) -> int:
    """Return the offset of the end of a node's text. The end mark of a block is the start of what follows it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _line_end(text: str, index: int) -> int:
    found = re.compile(r"\r?\n|\Z").search(text, index)
    assert found is not None
    return found.start()
