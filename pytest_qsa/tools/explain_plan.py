"""The plan of a run: what the selected tests need of each subject, and what that takes, as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ..captures import (
    CACHE_SITES,
    GENERATED,
    LOGITS,
    Capture,
    LayerNames,
    Outline,
    Request,
    compares,
    match_layers,
    merge_requests,
)
from ..checkpoint import Folder, stored_weights, threads, weight_names
from ..common import InfraError, QsaError, counted, shown_path, shown_time, text_table
from ..suite import (
    ANSWERED_AT_ONCE,
    MOST_HASHED,
    FileHashes,
    Generation,
    Machine,
    NamedSubject,
    Subject,
    files_of,
    fingerprint_of,
    unhashed,
    weight_files,
)
from .checkpoint_sizes import Sizes, sizes_of
from .estimates import (
    Setting,
    Work,
    batch_bytes,
    own_setting,
    settings_of,
    shown_bytes,
    waiting_bytes,
)

MEMORY_FACTOR = 1.5
TIME_FACTOR = 2
"""The estimates are meant to be right within these factors; benchmarks/estimates.py measures it."""
MOST_IDS = 4
READ_IN_A_SECOND = 1e8
"""Weights that one thread dequantizes and reduces in a second (docs/benchmarks.md)."""

Foresee = Callable[[Subject, Sequence[Request], Outline | None], Sequence[tuple[str, str]]]
"""Returns the tests of a subject that could not be judged, and why, by the layers of a kept capture or of the model."""
MeasureMachine = Callable[[str, Path | None], Machine]
"""Measures the machine for a dtype, with the file of weights that times reading."""


Needed = tuple[int, str]
NONE_NEEDED: Mapping[str, Needed] = {}


@dataclass
class Planned:
    """A subject with its tests.

    `measured`: those that need the pass, with their requests. `static`: those that read files only. `unannounced`:
    those whose needs are not known before they run. `positions`: test → the fewest positions, boundaries or prompts
    that could show its bound, and which of these it counts.
    """

    subject: Subject
    measured: list[tuple[str, Request]] = field(default_factory=list)
    static: list[str] = field(default_factory=list)
    unannounced: list[str] = field(default_factory=list)
    positions: dict[str, Needed] = field(default_factory=dict)

    @property
    def requests(self) -> tuple[Request, ...]:
        """What one pass has to measure."""
        return merge_requests(request for _, request in self.measured)


def gathered(
    tests: Iterable[tuple[str, Subject, Sequence[Request], bool]],
    positions: Mapping[str, Needed] = NONE_NEEDED,
) -> list[Planned]:
    """Group tests by their subject. A test: id, subject, requests, and whether it reads files only.

    `positions`: as of `Planned`.
    """
    found: dict[str, Planned] = {}
    for name, subject, requests, static in tests:
        planned = found.setdefault(subject.key, Planned(subject))
        planned.measured += [(name, request) for request in requests]
        planned.positions |= {name: positions[name]} if name in positions else {}
        if not requests:
            (planned.static if static else planned.unannounced).append(name)
    return list(found.values())


def _cached(planned: Planned, cache: Path | None) -> tuple[Capture | None, str]:
    """Return the kept capture that answers everything, and what is to be said of it; None where there is none."""
    if not planned.measured or planned.subject.model is None:
        return None, "there is nothing to keep"
    if cache is None:
        return None, "nothing is kept between runs (--qsa-no-cache)"
    # Before any file is hashed: where no capture is kept there is none to look for.
    if not any(cache.glob("*.qsa")) and not any(cache.glob("*.partial")):
        return None, "no capture is kept yet"
    subject, hashes, compared = planned.subject, FileHashes(cache / "hashes.json"), compares(planned.requests)
    # To hash a large checkpoint takes minutes, and a plan should not.
    unknown = unhashed(subject, hashes, with_reference=compared)
    if sum(file.stat().st_size for file in unknown) > MOST_HASHED:
        return None, "not known before the run has hashed the weights"
    fingerprint = fingerprint_of(subject, hashes, with_reference=compared)
    if fingerprint is None:
        return None, "captures of it can't be kept"
    try:
        capture = Capture.load(cache / f"{fingerprint}.qsa")
    except InfraError:
        partial = (cache / f"{fingerprint}.partial").exists()
        return None, "the first samples of an interrupted pass" if partial else "no capture of it is kept"
    if capture.covers(planned.requests):
        return capture, "a capture that answers all of it: nothing would be loaded"
    return None, "a capture that lacks something: the pass would run again"


def plan_lines(
    plans: Sequence[Planned], cache: Path | None, measure: MeasureMachine, foresee: Foresee = lambda *asked: ()
) -> Iterator[str]:
    """Yield the plan of each subject, and which of its tests would fail whatever is measured.

    `cache`: the folder of kept captures, None for none.
    """
    for planned in plans:
        kept, text = _cached(planned, cache)
        yield from _subject_lines(planned, kept, text, measure)
        # What isn't here would have to be fetched for it, and a model that comes from code to be made.
        if planned.measured and (planned.subject.files_only or planned.subject.base_folder is not None):
            problems = foresee(planned.subject, planned.requests, Outline(kept.names) if kept is not None else None)
            yield from (f"fails       {test}: {why}" for test, why in problems)


def _subject_lines(planned: Planned, kept: Capture | None, text: str, measure: MeasureMachine) -> Iterator[str]:
    """Yield the plan of a subject. `kept`: the capture that answers everything; `text`: what is to be said of it."""
    subject = planned.subject
    path = shown_path(Path(subject.path)) if Path(subject.path).is_dir() else subject.path
    yield ""
    yield f"subject     {subject.name}{f': {path}' if path else ''}"
    yield from _test_lines(planned)
    if not planned.measured:
        yield "pass        none: no model is loaded"
        return
    if subject.files_only:
        yield from _file_lines(planned, text)
        return
    folder = subject.base_folder
    if folder is None or subject.model is None:
        yield f"size        not known: {_why_unknown(planned)}"
        return
    try:
        sizes = sizes_of(Folder(folder, subject.model.gguf_file), subject.model)
    except QsaError as error:
        yield f"size        not known: {error}"
        return
    data = subject.data
    tests = len({name for name, _ in planned.measured})
    work = Work.of(data, planned.requests, sizes, subject.generation, tests)
    yield from _site_lines(planned, sizes.layers)
    yield f"data        {data.num_samples} × {data.seq_len} tokens of {data.source}, {data.batch_size} at once"
    yield from _answer_lines(planned)
    yield from _needed_lines(planned)
    yield _size_line(sizes)
    yield f"kept        {text}"
    if kept is None:  # a capture that answers needs no engine, so the machine is measured only without one
        largest = max(weight_files(folder), key=lambda file: file.stat().st_size, default=None)
        yield from _setting_lines(planned, sizes, work, measure(sizes.dtype, largest))


def _reference_sizes(planned: Planned) -> Sizes | None:
    """Return the sizes of the model that runs in lockstep; None where none does, or it isn't here."""
    reference = planned.subject.reference
    if not compares(planned.requests) or not isinstance(reference, NamedSubject) or reference.base_folder is None:
        return None
    return sizes_of(Folder(reference.base_folder, reference.model.gguf_file), reference.model)


def _answer_lines(planned: Planned) -> Iterator[str]:
    """Say which prompts are answered, where a test asks for that."""
    if any(GENERATED in request.statistics for request in planned.requests):
        asked = planned.subject.generation or Generation()
        what = f"{asked.num_prompts} × at most {asked.max_new_tokens} tokens, to prompts: {asked.prompts}"
        yield f"answers     {what}; by the model and by its reference, {ANSWERED_AT_ONCE} at once"


def _needed_lines(planned: Planned) -> Iterator[str]:
    """Say how many positions, boundaries or prompts the bounds take that an interval has to show."""
    data, prompts = planned.subject.data, (planned.subject.generation or Generation()).num_prompts
    positions = f"of {'at most ' if data.answers else ''}{data.num_samples * data.seq_len:,} here"
    answered = f"the answers to {data.num_samples:,} prompts tell how many there are"
    here = {"positions": positions, "boundaries": answered, "prompts": f"of {prompts:,} here"}
    for counts, told in here.items():
        needed = [(name, count) for name, (count, of) in planned.positions.items() if of == counts]
        for index, (name, count) in enumerate(needed):
            yield f"{'' if index else counts:<12}{name}: its bound takes {count:,} or more, {told}"


def _file_lines(planned: Planned, text: str) -> Iterator[str]:
    """Yield the plan of weights that are read from files. `text`: what is to be said of a kept capture."""
    try:
        files = files_of(planned.subject)
        yield from _site_lines(planned, weight_names(files))
    except QsaError as error:
        yield f"size        not known: {error}"
        return
    weights, wanted = stored_weights(files), planned.requests
    layers = {layer for each in wanted for layer in match_layers(list(weights), each.pattern, each.exclude)}
    seconds = sum(prod(weights[layer].shape) for layer in layers) / READ_IN_A_SECOND / threads()
    sizes = [f"{shown_bytes(_stored_bytes(files.folder))} in {counted(files.provenance.files, 'file')}"]
    if compares(wanted) and files.reference is not None:
        sizes.append(f"{shown_bytes(_stored_bytes(files.reference))} of the reference")
    took = shown_time(max(1, seconds))
    yield f"weights     read from the files, {' and '.join(sizes)}, in about {took}; no model is loaded"
    yield f"kept        {text}"


def _stored_bytes(folder: Folder) -> int:
    return sum(tensor.stop - tensor.start for tensor in folder.tensors.values())


def _why_unknown(planned: Planned) -> str:
    subject = planned.subject
    if subject.model is not None and subject.model.logprobs_only:
        return "a served model is asked, not loaded; its reference runs once over the same tokens"
    if subject.path:
        return f"{subject.path} is not in the local cache of the hub; `hf download {subject.path}` fetches it"
    return "the model comes from code; its layers are known, and patterns checked, once it is loaded"


def _test_lines(planned: Planned) -> Iterator[str]:
    measured = list(dict.fromkeys(name for name, _ in planned.measured))
    source = "the weights in the files" if planned.subject.files_only else "one pass"
    parts = [f"{len(measured)} from {source}"] if measured else []
    parts += [f"{len(planned.static)} from the files alone ({_ids(planned.static)})"] if planned.static else []
    yield f"tests       {', '.join(parts) or 'none whose needs are known'}"
    if planned.unannounced:
        names = _ids(planned.unannounced)
        yield f"            {len(planned.unannounced)} without a qsa mark ({names}): a pass each that nobody planned"


def _site_lines(planned: Planned, names: LayerNames) -> Iterator[str]:
    label = "sites"
    for request in planned.requests:
        statistics = ", ".join(sorted({statistic.name for statistic in request.statistics}))
        sites = (request.pattern, request.site, request.exclude)
        ids = [name for name, other in planned.measured if (other.pattern, other.site, other.exclude) == sites]
        caches = request.site in CACHE_SITES  # no file says which layers fill the cache
        own = names.called if caches else names.at(request.site, request.statistics)
        layers = len(match_layers(own, request.pattern, request.exclude))
        where = f"{request.site} of '{request.pattern}'" + (f" but '{request.exclude}'" if request.exclude else "")
        # A module without tensors, such as an activation function, is in no file.
        found = f"{layers} layers{' that may fill it' if caches else ''}" if layers else "no layer that the files name"
        what = LOGITS if request.site == LOGITS else f"{where}, {found}"
        yield f"{label:<12}{what}: {statistics}  ← {_ids(list(dict.fromkeys(ids)))}"
        label = ""


def _ids(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_IDS} more" if len(names) > MOST_IDS else ""
    return ", ".join(names[:MOST_IDS]) + more


def _size_line(sizes: Sizes) -> str:
    count = sizes.parameters
    shown = f"{count / 1e9:.1f} G" if count >= 1e9 else f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count:,}"
    files = counted(sizes.files, "file")
    quantized = "" if sizes.method == "none" else f" of {sizes.method}"
    text = f"checkpoint  {sizes.architecture}, {shown} parameters, {shown_bytes(sizes.stored)} in {files}{quantized}"
    return f"{text}; {shown_bytes(sizes.weights)} in memory, as {sizes.dtype}" if sizes.streams else text


def _setting_lines(planned: Planned, sizes: Sizes, work: Work, machine: Machine) -> Iterator[str]:
    reference = _reference_sizes(planned)
    settings = settings_of(sizes, work, machine, reference)
    own = own_setting(settings, planned.subject.memory)
    parts = {
        "weights": sizes.weights,
        "those of the reference": reference.weights if reference else 0,
        "or, streamed, two blocks": sizes.streamed if sizes.streams else 0,
        "states that wait then": waiting_bytes(sizes, work, machine) if sizes.streams else 0,
        "a batch on its way": batch_bytes(sizes, work),
        "sums": work.sums,
    }
    shown = ", ".join(f"{what} {shown_bytes(size)}" for what, size in parts.items() if size)
    yield f"memory      {shown}"
    yield f"machine     {_machine_text(machine)}"
    if planned.subject.model is not None and planned.subject.model.engine.name == "vllm":
        yield "engine      vLLM, which takes about 20 s more to start, and memory for its KV cache"
    yield ""
    rows = [["memory:", "takes", "time", "of the processor", "fits"]]
    for setting in settings:
        remarks = ["← the suite's"] * (setting is own) + [setting.note] * bool(setting.note)
        fits = "  ".join(["yes" if setting.fits else "no", *remarks])
        took = [shown_time(setting.seconds), shown_time(setting.processor)]
        rows.append([setting.text, _taken(setting, machine), *took, fits])
    yield from text_table(rows, indent="  ")
    yield from _advice(settings, own)
    models = [sizes] if reference is None else [sizes, reference]
    flops, stored = sum(work.flops(each) for each in models), sum(each.stored for each in models)
    yield (
        f"  estimates: memory within a factor of {MEMORY_FACTOR:g}, the processor's time of {TIME_FACTOR} "
        f"({_flops(flops)}FLOP at the measured rate; {shown_bytes(stored)} read)"
    )
    if machine.slowed(1) > 1:
        yield (
            f"  this machine is busy, {machine.free_cores:.1f} of its cores free over two seconds: the time is that of "
            "a run that gets no more"
        )


def _advice(settings: Sequence[Setting], own: Setting | None) -> Iterator[str]:
    """Yield what to write where the suite's own setting doesn't fit, or fetches weights for every batch."""
    fitting = [setting for setting in settings if setting.fits]
    if not fitting:
        yield "  nothing fits here: lower data.seq_len or batch_size, or take a larger machine"
        return
    best = min(fitting, key=lambda setting: setting.seconds)
    if own is None or not own.fits or own.note:
        yield f"  → memory: {best.text}"


def _taken(setting: Setting, machine: Machine) -> str:
    host = f"{shown_bytes(setting.host)} of {shown_bytes(machine.free)}"
    if setting.gpu is None:
        return host
    return f"GPU {shown_bytes(setting.gpu)} of {shown_bytes(machine.gpus[0].free)}"


def _machine_text(machine: Machine) -> str:
    gpus = ", ".join(f"{gpu.name} ({shown_bytes(gpu.free)} free)" for gpu in machine.gpus) or "no GPU"
    rates = ", ".join(f"{_flops(rate)}FLOP/s ({device})" for device, rate in machine.rates.items())
    return (
        f"{counted(machine.cores, 'thread')}, {shown_bytes(machine.free)} of {shown_bytes(machine.memory)} free, "
        f"{gpus}; measured: {rates}, {shown_bytes(machine.reading)}/s from the files"
    )


def _flops(count: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {prefix}"
    return f"{count / 1e6:.3g} M"
