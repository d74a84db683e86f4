"""List a model's layers, or those that a regex finds, without reading weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from .. import captures, checkpoint, engine, suite
from ..common import shown_path, text_table
from .shared import OK, add_allow_path, add_target, command_parser, say, source_of

EXAMPLES = ("qsa layers gate.qsa.yaml", r"qsa layers checkpoints/my-model 'mlp\.down_proj$'")


def run(arguments: Sequence[str]) -> int:
    """Print name, class, shape of the weight and number of parameters of each layer.

    Of weights in files: name, the dtype that they are stored in, shape and number of elements.

    Raises:
        SuiteError: the configuration is wrong or has no model, or the regex finds no layer.
        InfraError: the model's configuration, or its files, can't be read.
    """
    parser = command_parser(__name__, __doc__, examples=EXAMPLES)
    add_target(parser)
    parser.add_argument("--model", help="a folder or hub id, instead of TARGET")
    parser.add_argument("--base", help="the base of an adapter, if the adapter doesn't name it")
    parser.add_argument(
        "--weights", choices=("loaded", "files"), help="files: the weights that the files hold, as model.weights: files"
    )
    parser.add_argument("regex", nargs="?", help="show only the layers that it finds")
    add_allow_path(parser)
    options = parser.parse_args(arguments)
    if (options.config or options.model) and options.regex is None:
        options.target, options.regex = None, options.target  # the one word is the regex
    if options.model:
        if options.config or options.target:
            parser.error("name one of TARGET, --config and --model")
        options.target = options.model
    source = source_of(parser, options)
    if options.base:
        source.data["model"] = {**(source.data.get("model") or {}), "base": options.base}
    subject = suite.subject_of(suite.load_suite(source))

    files = (options.weights or subject.model.weights) == "files"
    rows = _stored(subject) if files else engine.outline(subject.model, subject.path, subject.base)
    names = [row[0] for row in rows]
    found = captures.match_layers(names, options.regex) if options.regex else names
    if not found:
        raise captures.no_match(names, options.regex, None)
    wanted = set(found)
    table = [(name, kind, shape, f"{count:,}") for name, kind, shape, count in rows if name in wanted]
    say(*text_table(table, right={3}, heads=False, faint={1, 2}))
    say(f"{len(found)} of {len(rows)} layers")
    if (folder := subject.local_folder) is not None and (folder / checkpoint.ADAPTER).is_file():
        on = f" on {shown_path(Path(subject.base_path))}" if subject.base_path else ""
        say(f"with an adapter, {checkpoint.Adapter(folder)} in {shown_path(folder)}{on}")
    return OK


def _stored(subject: suite.Subject) -> list[tuple[str, str, str, int]]:
    """Return (name, dtype, shape, number of elements) of each weight of the files; no shape where it can't be read."""
    rows = []
    for layer, weight in checkpoint.stored_weights(suite.files_of(subject)).items():
        tensor = weight.form.weight_of(layer)
        dtype = tensor.dtype if tensor is not None else weight.form.weight_dtype(layer)
        rows.append((layer, dtype, "×".join(map(str, weight.shape)), prod(weight.shape) if weight.shape else 0))
    return rows
