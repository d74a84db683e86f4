"""Rank the layers of a quantized checkpoint by what quantizing each costs, and list those to keep in 16 bits.

A layer is put alone into the original, in float32, and the KL divergence of what the model then predicts is measured.
Layers that servers fuse are one unit. The first unit saves most KL divergence for each bit that keeping it adds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import engine, metrics, suite, tools
from ..common import SuiteError, counted, phase, shown_path, status, write_atomically
from .shared import (
    OK,
    add_allow_code,
    add_target,
    command_parser,
    parse_with_overrides,
    say,
    source_of,
    writing,
)

EXAMPLES = (
    "qsa rank checkpoints/my-model-int4 --reference checkpoints/my-model",
    "qsa rank checkpoints/my-model-int4 --reference checkpoints/my-model --target-kl 0.05 -o recipe.yaml",
    "qsa rank gate.qsa.yaml --target-bits 5 --for gptq -o dynamic.json",
)
WINDOWS = ("data.num_samples=16", "data.seq_len=128")
"""The data of a checkpoint that no suite names: each window costs two forwards a block."""


def run(arguments: Sequence[str]) -> int:
    """Print the ranking, and what to keep for a budget.

    Raises:
        SuiteError: the suite is wrong, no reference is named, or the budget is met already or can't be.
        AnomalyError: the checkpoint's weights aren't those of the reference's layers, or aren't finite.
        InfraError: a file can't be read or written, or the reference can't be loaded or run.
    """
    parser = _parser()
    options, overrides = parse_with_overrides(parser, arguments)
    if options.output is not None and options.target_kl is None and options.target_bits is None:
        parser.error("-o: say for which budget, --target-kl or --target-bits")
    source = source_of(parser, options)
    if source.path == Path("TARGET"):
        overrides = [*WINDOWS, *overrides]
    file = suite.load_suite(source, overrides, "--")
    subject = suite.subject_of(file).named
    if not isinstance(subject.reference, suite.NamedSubject):
        raise SuiteError("qsa rank compares with the original: name it, --reference ORIGINAL")
    quantized, code = _units(subject, options), options.qsa_allow_code
    with status(subject.name) as progress, engine.substitution_of(subject, quantized.weight, allow_code=code) as model:
        ranking = tools.ranking_of(model, quantized, seconds=60 * options.minutes, progress=progress)
        kept = _kept(model, quantized, ranking, options)
        left_out = [name for name in model.linears if name not in {*quantized.modules}]
    say(_measured_text(subject, ranking.windows), "", *tools.ranking_lines(ranking, options.top))
    if kept is not None:
        say("", *tools.kept_lines(ranking, *kept))
    if kept is not None and options.output is not None:
        quantizer = options.quantizer or tools.quantizer_of(quantized.method)
        with writing(options.output):
            write_atomically(options.output, tools.ignore_list(quantizer, kept[0], left_out))
        say(f"written for {quantizer}: {shown_path(options.output)}")
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        __name__, __doc__, "TARGET --reference ORIGINAL [options] [--KEY VALUE …]", examples=EXAMPLES
    )
    add_target(parser)
    parser.add_argument(
        "--reference",
        dest="model.reference",
        default=argparse.SUPPRESS,
        metavar="ORIGINAL",
        help="what the checkpoint was made from; default: the suite's",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--target-kl", type=above_zero, metavar="NATS", help="keep the fewest with at most this KL left"
    )
    budget.add_argument(
        "--target-bits", type=above_zero, metavar="BITS", help="keep what fits into these bits a weight"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write what to keep as an ignore list there")
    parser.add_argument(
        "--for",
        dest="quantizer",
        choices=tuple(tools.WRITERS),
        help="the quantizer that reads the list; default: the one that made the checkpoint",
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="how many units to list (default: 20)")
    parser.add_argument(
        "--minutes",
        type=above_zero,
        default=60.0,
        metavar="N",
        help="estimate part of the units where all would take longer (default: 60)",
    )
    add_allow_code(parser)
    return parser


def above_zero(text: str) -> float:
    """Read a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text} is no number above 0")


def _units(subject: suite.NamedSubject, options: argparse.Namespace) -> tools.QuantizedUnits:
    """Return the units of the checkpoint, by the names of the reference's outline: before any weight is read."""
    assert isinstance(subject.reference, suite.NamedSubject)
    own = subject.reference
    files = suite.files_of(subject)
    names = engine.layer_names(own.model, own.path, own.memory, allow_code=options.qsa_allow_code, base=own.base)
    quantized = tools.QuantizedUnits(files, names.all)
    if quantized.left_out:
        count = counted(len(quantized.left_out), "quantized layer")
        text = f"{count} of the files ({quantized.left_out[0]}) have none in the reference, and aren't ranked"
        say(f"qsa: warning: {text}", file=sys.stderr)
    most, own_bits = options.target_bits, quantized.bits
    if most is not None and own_bits > most:
        raise SuiteError(f"--target-bits {most:g}: the quantized layers have {own_bits:.3f} bits a weight already")
    return quantized


def _measured_text(subject: suite.NamedSubject, windows: int) -> str:
    assert isinstance(subject.reference, suite.NamedSubject)
    path, original = (shown_path(Path(each.path)) for each in (subject, subject.reference))
    return (
        f"KL divergence from {original}, in float32, where one unit has the weights of {path}; "
        f"{counted(windows, 'window')} of {subject.data.seq_len} tokens"
    )


def _kept(
    model: engine.Substitution,
    quantized: tools.QuantizedUnits,
    ranking: tools.Ranking,
    options: argparse.Namespace,
) -> tuple[Sequence[tools.Unit], metrics.Estimate] | None:
    """Return what to keep for the budget, and the KL divergence that it leaves; None without a budget."""

    def left(kept: Sequence[tools.Unit]) -> metrics.Estimate:
        names = {unit.name for unit in kept}
        layers = [layer for name, own in quantized.layers.items() if name not in names for layer in own]
        return tools.mean_of(model.together(layers))

    if options.target_kl is not None:
        phase("what is left of the whole")
        return ranking.within_kl(options.target_kl, left)
    if options.target_bits is None:
        return None
    phase("what is left of the whole")
    kept = ranking.within_bits(options.target_bits)
    return kept, left(kept) if kept else ranking.whole
