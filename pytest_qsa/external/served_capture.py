"""A served subject → a capture of its predictions, each number exact or in an interval.

The site `logits` holds the exact numbers, NaN where one isn't known. Two more sites hold the ends of the intervals, so
that a capture's file keeps all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import engine
from ..captures import (
    AGREEMENT,
    GENERATION,
    LOGITS,
    SCORES,
    SHIFTS,
    Capture,
    DataProvenance,
    ModelProvenance,
    PredictionMargins,
    PredictionOverlap,
    Provenance,
    Request,
    ServedProvenance,
    Site,
    SiteNumbers,
    asks_for_answers,
    compares,
    data_fingerprint,
    shifts_of,
    without_answers,
)
from ..common import AnomalyError, InfraError, Progress, QsaError
from ..metrics import TokenScores, numbers_of
from ..suite import Floor, Served, Subject, located
from .logprobs import (
    AT_LEAST,
    AT_MOST,
    Agreement,
    Between,
    Floats,
    LogprobTable,
    ReferenceRows,
    agreement_of,
    read_logprobs,
    rows_of_table,
)
from .served_answers import served_answers
from .served_client import Client

if TYPE_CHECKING:
    from ..engine import Loaded

LOGPROB_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class _Reference:
    """The reference of a served model: a loaded model, or a file of logprobs; neither where nothing compares."""

    loaded: Loaded | None = None
    tables: Sequence[LogprobTable] | None = None


def capture_served(
    subject: Subject, requests: Sequence[Request], *, allow_code: bool = False, progress: Progress | None = None
) -> Capture:
    """Ask the served model or read the file of its answers, and run the reference where something is compared.

    Raises:
        InfraError: a file, the server or the reference fails.
        AnomalyError: there is nothing sound in what they say, or they have other tokens.
    """
    assert subject.model is not None
    recorded = subject.model.logprobs
    if recorded and asks_for_answers(requests):
        raise InfraError("generation: a file of logprobs answers no prompts: name the server, model.served")
    with _reference(subject, requests, allow_code=allow_code) as reference:
        answers = _answers(subject, reference, progress) if asks_for_answers(requests) else None
        if answers is not None and not without_answers(requests):
            empty = Capture({}, provenance=_provenance(subject, (), ()), plan=tuple(requests))
            return _with_answers(empty, subject, *answers)
        tokens, tokenizer = _tokens(subject, reference)
        tables = read_logprobs(subject.folder / recorded) if recorded else _asked(subject, tokens, progress)
        rows = _rows(reference, tables, progress)
    tail = subject.model.tail
    floor = tail.at_least if isinstance(tail, Floor) else None
    found = [agreement_of(t, r, floor=floor, alike=tail == "as_reference") for t, r in zip(tables, rows, strict=True)]
    capture = _capture(subject, requests, tables, found, tokenizer)
    return capture if answers is None else _with_answers(capture, subject, *answers)


def _answers(
    subject: Subject, reference: _Reference, progress: Progress | None
) -> tuple[SiteNumbers, Mapping[int, str]]:
    assert subject.model is not None
    assert subject.model.served is not None
    if reference.loaded is None:
        raise InfraError("generation: answers are compared with a model that runs here: name it, model.reference")
    return served_answers(subject, Client.connect(subject.model.served), reference.loaded, progress)


def _with_answers(capture: Capture, subject: Subject, answers: SiteNumbers, pieces: Mapping[int, str]) -> Capture:
    pieces = dict(sorted({**capture.pieces, **pieces}.items()))
    data = replace(capture.provenance.data, prompts=engine.Prompts.of(subject).fingerprint)
    provenance = replace(capture.provenance, data=data)
    return replace(
        capture, sites={(GENERATION, LOGITS): answers, **capture.sites}, pieces=pieces, provenance=provenance
    )


@contextmanager
def _reference(subject: Subject, requests: Sequence[Request], *, allow_code: bool) -> Iterator[_Reference]:
    assert subject.model is not None
    named = subject.model.reference
    if named is None or not compares(requests):
        yield _Reference()
        return
    local = subject.folder / named
    if local.suffix in LOGPROB_SUFFIXES:
        yield _Reference(tables=read_logprobs(local))
        return
    if local.is_file():
        raise InfraError(
            f"model.reference {named}: a served model is compared with a checkpoint, or a .json or .jsonl of logprobs"
        )
    # `engine` loads torch where one of its names is used: only for a reference that has to run.
    model = subject.named.with_checkpoint(named)
    try:
        loaded = engine.load_model(model.model, model.path, subject.memory, allow_code=allow_code, base=model.base)
    except QsaError as error:
        # The same kind of error: a damaged reference is ANOMALOUS, one that is not there INFRA.
        raise type(error)(f"model.reference: {error}") from error
    try:
        yield _Reference(loaded=loaded)
    finally:
        loaded.close()


def _tokens(subject: Subject, reference: _Reference) -> tuple[Sequence[Sequence[int]], Any]:
    """Return the token ids to ask for, and the tokenizer that they come from, if any."""
    assert subject.model is not None
    tokenizer = reference.loaded.tokenizer if reference.loaded else None
    if reference.tables is not None:
        return [table.tokens.tolist() for table in reference.tables], tokenizer
    if subject.model.served is None:
        return [], tokenizer
    named = subject.model.served.tokenizer or subject.model.reference
    if tokenizer is None and named is not None:
        tokenizer = engine.tokenizer_at(located(subject.folder, named))
    if tokenizer is None:
        raise InfraError(
            "there is no tokenizer to make prompts of the data with: name the original, model.reference, or "
            "served.tokenizer"
        )
    return engine.windows(subject, tokenizer), tokenizer


def _asked(subject: Subject, tokens: Sequence[Sequence[int]], progress: Progress | None) -> list[LogprobTable]:
    served: Served | None = subject.model.served if subject.model else None
    assert served is not None
    # Before the first prompt: a wrong address or name of a model costs one request.
    client = Client.connect(served)
    tables = []
    for sample, ids in enumerate(tokens):
        tables.append(client.table(ids, sample))
        if progress is not None:
            progress(sample + 1, len(tokens))
    return tables


def _rows(
    reference: _Reference, tables: Sequence[LogprobTable], progress: Progress | None
) -> Sequence[ReferenceRows | None]:
    if reference.tables is not None:
        theirs = [table.tokens.tolist() for table in reference.tables]
        if theirs != [table.tokens.tolist() for table in tables]:
            raise AnomalyError("the logprobs of the reference are of other tokens: nothing can be compared")
        return [rows_of_table(one, other) for one, other in zip(reference.tables, tables, strict=True)]
    if reference.loaded is None:
        return [None] * len(tables)
    answers = engine.answers_of(reference.loaded, [(table.tokens, table.ids) for table in tables], progress)
    return [ReferenceRows(*answer) for answer in answers]


def _capture(
    subject: Subject,
    requests: Sequence[Request],
    tables: Sequence[LogprobTable],
    found: Sequence[Agreement],
    tokenizer: Any,
) -> Capture:
    statistics = frozenset({SCORES} | ({AGREEMENT, PredictionOverlap()} if found[0].kl is not None else set()))
    nll = [each.nll for each in found]
    kl = [each.kl for each in found if each.kl is not None]

    def numbers(chosen: Callable[[Sequence[Between]], Sequence[Floats]]) -> SiteNumbers:
        divergences = chosen(kl) if kl else [None] * len(found)
        scores = [
            TokenScores(*(_padded(column) for column in (own, each.reference_nll, divergence, each.same_top)))
            for own, divergence, each in zip(chosen(nll), divergences, found, strict=True)
        ]
        made = numbers_of(scores, range(len(scores)), statistics, "float32")
        shares = [each.overlap for each in found if each.overlap is not None]
        margins = [each.margins for each in found if each.margins is not None]
        if shares:
            made = made.having((), {"overlap": np.concatenate([_padded(each) for each in chosen(shares)])})
        if len(margins) == len(found):
            rows = [np.append(each, np.full((1, each.shape[1]), np.nan), axis=0) for each in margins]
            made = made.having({PredictionMargins()}, {"margins": np.concatenate(rows)})
        if any(SHIFTS in request.statistics for request in requests):
            made = made.having({SHIFTS}, {SHIFTS.key: shifts_of([table.tokens for table in tables])})
        return made

    sites: dict[tuple[str, Site], SiteNumbers] = {
        (LOGITS, LOGITS): numbers(_exact),
        (AT_LEAST, LOGITS): numbers(lambda bounds: [each.low for each in bounds]),
        (AT_MOST, LOGITS): numbers(lambda bounds: [each.high for each in bounds]),
    }
    return Capture(
        sites,
        tokens=tuple(table.tokens for table in tables),
        pieces=_pieces(tables, tokenizer),
        provenance=_provenance(subject, tables, found),
        plan=tuple(requests),
    )


def _exact(bounds: Sequence[Between]) -> list[Floats]:
    """Return the numbers where all are known exactly, else NaN: the mean of the known ones alone would mislead."""
    exact = all(np.array_equal(each.low, each.high) for each in bounds)
    return [each.low if exact else np.full_like(each.low, np.nan) for each in bounds]


def _padded(column: Floats | None) -> Any:
    """Add NaN for the last position of a sample: a server gives no prediction there."""
    return None if column is None else np.append(column, np.nan)


def _pieces(tables: Sequence[LogprobTable], tokenizer: Any) -> dict[int, str]:
    if tokenizer is None:
        return {}
    decode = engine.decoder_of(tokenizer)
    assert decode is not None
    return dict(decode(sorted({int(token) for table in tables for token in table.tokens.tolist()})))


def _provenance(subject: Subject, tables: Sequence[LogprobTable], found: Sequence[Agreement]) -> Provenance:
    """Return who answered, with what, about which tokens. A server tells no dtype and no device: both stay unknown."""
    model = subject.model
    assert model is not None
    served = f"{model.served.model or model.id} by {model.served.api}" if model.served else "from a file"
    outside = [each.outside for each in found if each.outside is not None]
    answers = ServedProvenance(
        served=served,
        logprobs=min((table.least for table in tables), default=0),
        outside=float(np.concatenate(outside).mean()) if outside else None,
        tail=model.tail if isinstance(model.tail, str) else f"at least {model.tail.at_least:g}",
    )
    known = ModelProvenance(
        subject.path,
        served=answers,
        dtype="unknown",
        device="unknown",
        device_class="served",
        versions={},
        weights=None,
    )
    data = DataProvenance(model.logprobs or subject.data.source, fingerprint=_fingerprint(tables))
    if model.served and tables:
        longest = max(len(table.tokens) for table in tables)
        data = replace(data, num_samples=len(tables), seq_len=longest, seed=subject.data.seed)
    return Provenance(known, data, reference=ModelProvenance(model.reference or "") if outside else None)


def _fingerprint(tables: Sequence[LogprobTable]) -> str:
    """Return the hash of the tokens; a pass over the same windows has the same hash."""
    # As a batch's token ids have it: int64, little-endian.
    rows = (table.tokens.astype("<i8") for table in tables)
    return data_fingerprint(("input_ids", ids.dtype.name, ids.shape, ids.tobytes()) for ids in rows)
