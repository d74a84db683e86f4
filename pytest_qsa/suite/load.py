"""A suite, typed: its JSON Schema, and its file with overrides → a `Suite` in which every value knows its line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ..captures import PositionRange
from ..common import SuiteError, did_you_mean, shown_path
from ..metrics import METRICS
from .assertion import (
    BOUND_KEYS,
    NAME_PLACEHOLDER,
    Assertion,
    ExternalAssertion,
    MeasuredAssertion,
)
from .assertion_models import ASSERTIONS, AnyAssertion
from .inherit import apply_defaults, read_suite
from .paths import Boundary, Roots
from .sections import SELF, Data, Generation, Memory, Model, Strict, fields_at
from .subjects import Checkpoint, NamedSubject, Subject, hub_set_of, local_path
from .visualization import Visualization
from .vllm import unfit_for_vllm
from .yaml_source import LocatedError, Location, Place, YamlSource, read_value


class Suite(Strict):
    """A suite: a configuration of quant-smooth-ana, plus `assertions`. Without `model`, `qsa_model` is the subject.

    `extends` and `defaults` are applied before a suite is validated (inherit.py), so nothing else reads them.
    """

    extends: str | list[str] | None = None
    defaults: dict[str, Any] = Field(default={})
    model: Model | None = None
    data: Data = Data()
    generation: Generation | None = None
    memory: Memory = Memory()
    visualization: Visualization = Visualization()
    assertions: list[AnyAssertion] | None = None


PARTIAL = "PartialAssertion"
"""The name of the schema of an assertion whose other keys come from a base or from `defaults`."""


def suite_schema() -> dict[str, Any]:
    """Return the JSON Schema of a suite file.

    An assertion must be complete unless the file extends another one or has defaults that may complete it.
    """
    schema = Suite.model_json_schema()
    properties, definitions = schema["properties"], schema["$defs"]
    whole = next(arm for arm in properties["assertions"]["anyOf"] if arm.get("type") == "array")
    models = [definitions[arm["$ref"].rpartition("/")[2]] for arm in whole["items"]["oneOf"]]
    definitions[PARTIAL] = _partial(models)
    partial = {"$ref": f"#/$defs/{PARTIAL}"}
    by_id = {"type": "object", "additionalProperties": {"anyOf": [partial, {"type": "null"}]}}
    description = "A list, or a mapping of ids, in which null takes out a base's assertion"
    # Without a type here: `then` and `else` say which form an assertion needs.
    properties["assertions"] = {"title": "Assertions", "description": description}
    properties["defaults"] = {**partial, "description": "What all assertions share"}
    entries = {"type": "array", "items": {"allOf": [partial, {"required": ["id"]}]}}
    return {
        **schema,
        "if": {"anyOf": [{"required": ["extends"]}, {"required": ["defaults"]}]},
        "then": {"properties": {"assertions": {"anyOf": [entries, by_id]}}},
        "else": {"properties": {"assertions": {"anyOf": [whole, by_id]}}},
    }


def _partial(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of an assertion that may lack any key and may set each to null."""
    properties: dict[str, list[Any]] = {}
    for model in models:
        for name, schema in model["properties"].items():
            known = properties.setdefault(name, [])
            known += [schema] if schema not in known else []
    nullable = {name: {"anyOf": [*schemas, {"type": "null"}]} for name, schemas in properties.items()}
    description = "The keys of an assertion that stand here; null takes out what a base or the defaults say"
    return {"type": "object", "description": description, "properties": nullable, "additionalProperties": False}


@dataclass(frozen=True)
class SuiteFile:
    """A suite and the file that it comes from."""

    path: Path
    suite: Suite
    source: YamlSource

    @property
    def boundary(self) -> Boundary:
        """Where the files that the suite names may lie."""
        return self.source.boundary

    @property
    def assertions(self) -> Sequence[Assertion]:
        """The assertions in the order of the file; none for a configuration without any."""
        return self.suite.assertions or ()

    def place_of(self, index: int) -> Place:
        """Return the place where an assertion begins, in the suite itself or in one that it extends."""
        return self.source.place(("assertions", index))

    def bound_place_of(self, index: int, key: Location = ()) -> Place:
        """Return the place of a bound of an assertion; without a key, of its first bound or else of its baseline."""
        keys: list[Location] = [key] if key else [(name,) for name in (*BOUND_KEYS, "baseline")]
        places = [self.source.places.get(("assertions", index, *name)) for name in keys]
        return next((place for place in places if place is not None), self.place_of(index))


def subject_of(file: SuiteFile) -> NamedSubject:
    """Return the subject that a suite names.

    Raises:
        SuiteError: there is no such section.
    """
    suite = file.suite
    if suite.model is None:
        raise SuiteError(f"{shown_path(file.path)}:1: there is no section 'model'")
    folder, asked = file.path.parent, suite.generation
    return NamedSubject(suite.model.id, suite.model, suite.data, suite.memory, folder, generation=asked)


def subject_on(file: SuiteFile, checkpoint: Checkpoint | None) -> Subject:
    """Return the subject of a suite on a checkpoint, which takes the place of whatever says where its model is from."""
    suite = file.suite
    name = (checkpoint.name if checkpoint else None) or (suite.model.id if suite.model else "model")
    model = suite.model
    if checkpoint is not None:
        base = model.model_dump(exclude={"factory", "path", "served", "logprobs"}) if model else {}
        model = Model(**base, path=checkpoint.path)
    own, folder = checkpoint.path if checkpoint else None, file.path.parent
    return Subject(name, model, suite.data, suite.memory, folder, own, generation=suite.generation)


def misfit(path: Path, override: str, roots: Roots | None = None) -> str | None:
    """Return why an override doesn't fit a suite, which has no assertion of that id; None where it fits."""
    if not override.startswith("assertions."):
        return None
    source = read_suite(path, roots)
    try:
        _split(source, override.partition("=")[0])
    except SuiteError as error:
        return str(error)
    return None


def load_suite(
    given: Path | YamlSource,
    overrides: Iterable[str] = (),
    option: str = "--qsa-set ",
    *,
    noise: bool = True,
    conftests: bool = False,
    roots: Roots | None = None,
) -> SuiteFile:
    """Read a suite, unless it is read already, apply `KEY=VALUE` overrides and validate it.

    `option`: how the user gives an override, for error messages. `noise`: whether bounds are checked against the noise
    that an earlier calibration measured. `conftests`: those that may define metrics were imported, as pytest does.
    `roots`: as in `read_suite`.

    Raises:
        SuiteError: `file:line: what is wrong (did you mean …?)`, for the first mistake of the file.
    """
    source = read_suite(given, roots) if isinstance(given, Path) else given
    # Where an override made the mistake, the message names the option: the file's line is right.
    overridden = {_apply(source, override, option): f"{option}{override}" for override in overrides}
    try:
        apply_defaults(source)  # after the overrides, which may set defaults
        _check_assertions(source, conftests)
        for entry in () if noise else source.data.get("assertions") or ():
            entry.pop("noise", None)
        suite = Suite.model_validate(source.data)
        for index, assertion in enumerate(suite.assertions or ()):
            _check_previous(source, suite.model, index, assertion)
            _check_reference(source, suite.model, index, assertion)
            _check_loaded(source, suite.model, index, assertion)
            _check_engine(source, suite.model, index, assertion)
            _check_range(source, suite, index, assertion)
            _check_dtype(source, suite.model, index, assertion)
        _check_paths(source, suite)
    except ValidationError as error:
        raise _explain(source, error, overridden) from None
    except LocatedError as error:
        override = overridden.get(error.location)
        raise SuiteError(f"{override}: {error.what}") if override else error from None
    return SuiteFile(source.path, suite, source)


def _apply(source: YamlSource, override: str, option: str) -> Location:
    key, _, text = override.partition("=")
    try:
        *parents, last = _split(source, key)
    except SuiteError as error:
        raise SuiteError(f"{option}{override}: {error}") from None
    here: Any = source.data
    for part in parents:
        # An override may name a section that the file hasn't.
        here = here.setdefault(part, {}) if isinstance(here, dict) else here[part]
        if not isinstance(here, (dict, list)):
            raise SuiteError(f"{option}{override}: '{part}' is a value, not a section")
    here[last] = read_value(text)
    source.given.add(text)
    return (*parents, last)


def _split(source: YamlSource, key: str) -> Location:
    """Split a dotted key into a location. An assertion is named by its id, which may contain dots itself."""
    head, _, rest = key.partition(".")
    if head != "assertions":
        return tuple(key.split("."))
    entries = source.data.get("assertions") or []
    ids = {str(entry["id"]): index for index, entry in enumerate(entries) if isinstance(entry, dict) and "id" in entry}
    # With the ids `a` and `a.b`, `a.b.max` is of `a.b`.
    name = max((known for known in ids if rest.startswith(f"{known}.")), key=len, default=None)
    if name is None:
        wrong = rest.partition(".")[0]
        raise SuiteError(f"no assertion '{wrong}' in {shown_path(source.path)}{did_you_mean(wrong, ids)}")
    return ("assertions", ids[name], *rest[len(name) + 1 :].split("."))


def check_override(override: str, option: str = "--qsa-set ") -> None:
    """Check the form of an override and that its key exists; no suite has to be read for it.

    Raises:
        SuiteError: the form is wrong, or there is no such key.
    """
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise SuiteError(f"{option}{override}: write KEY=VALUE, such as data.num_samples=8")
    parts = key.split(".")
    # Which keys these have depends on the suite, so that they are checked when it is read.
    if parts[0] in ("assertions", "defaults") and len(parts) > 1:
        return
    if parts[0] == "extends":
        raise SuiteError(f"{option}{override}: what a suite extends stands in its file")
    for index, part in enumerate(parts):
        fields = fields_at(Suite, parts[:index])
        if part not in fields:
            raise SuiteError(
                f"{option}{key}: there is no key '{'.'.join(parts[: index + 1])}'{did_you_mean(part, fields)}"
            )


def _check_assertions(source: YamlSource, conftests: bool) -> None:
    """Check what pydantic would report unclearly: no assertion is left, or a metric is missing or unknown."""
    if "assertions" not in source.data:
        return
    if not source.data["assertions"]:
        raise source.error(("assertions",), "no assertion is left of those of the base: nothing would be checked")
    for index, entry in enumerate(source.data["assertions"]):
        here: Location = ("assertions", index)
        metric = entry.get("metric")
        if metric is None:
            raise source.error(here, f"the key 'metric' is missing{_unknown_id(source, index)}")
        if not isinstance(metric, str) or metric not in ASSERTIONS:
            hint = did_you_mean(str(metric), ASSERTIONS) or f"; the metrics are {', '.join(ASSERTIONS)}"
            more = "" if conftests else "; qsa imports no conftest.py, so one that defines it is known to pytest only"
            raise source.error((*here, "metric"), f"unknown metric '{metric}'{hint}{more}")


def _check_previous(source: YamlSource, model: Model | None, index: int, assertion: Assertion) -> None:
    """Check that a bound that follows the last release finds `model.previous`, and a metric that it can measure."""
    key = assertion.follows
    if key and (model is None or model.previous is None):
        raise source.error(("assertions", index, key), f"{key} follows the last release: name it, model.previous")
    if key and not isinstance(assertion, MeasuredAssertion):
        raise source.error(("assertions", index, key), f"{assertion.metric} is of one checkpoint alone: write a number")


def _check_reference(source: YamlSource, model: Model | None, index: int, assertion: Assertion) -> None:
    """Check that a metric that compares finds `model.reference`, and in it what the metric needs.

    A reference file holds a sample of the tokens only. Without `model`, a fixture may bring a reference.
    """
    metric = METRICS.get(assertion.metric)
    if metric is None or not metric.against or model is None:
        return
    here: Location = ("assertions", index, "metric")
    named = model.reference
    if named is None:
        raise source.error(
            here,
            f"{assertion.metric} compares with the original: name it, model.reference (a folder, a hub id or a "
            "kept reference capture)",
        )
    if named == SELF and getattr(assertion, "site", None) == "weight":
        raise source.error(here, f"{assertion.metric} compares weights, and model.reference: self has the same ones")
    if not _is_recorded(source, named):
        return
    by_channel = getattr(assertion, "by", None) == "channel"
    if getattr(assertion, "site", None) == "weight" or by_channel:
        what = "by: channel sums up every token" if by_channel else f"{assertion.metric} reads weights"
        raise source.error(
            here,
            f"{what}, and {named} holds some tokens only: name the original, model.reference, in a suite of its own",
        )


def _is_recorded(source: YamlSource, reference: str) -> bool:
    """Say whether a reference is a file; one that is still to be made is known by its suffix."""
    return reference.endswith(".qsa") or (source.path.parent / reference).is_file()


def _check_engine(source: YamlSource, model: Model | None, index: int, assertion: Assertion) -> None:
    """Check that a metric of two engines finds a second one, and that vLLM is asked only for what it can show."""
    if assertion.metric == "engine_gap" and (model is None or model.engine.name == "transformers"):
        raise source.error(
            ("assertions", index, "metric"),
            "engine_gap holds an engine against transformers, and transformers runs this model: say model.engine: vllm",
        )
    if assertion.metric == "mtp_acceptance" and (model is None or model.engine.name == "transformers"):
        raise source.error(
            ("assertions", index, "metric"),
            "mtp_acceptance reads vLLM's counters of drafted tokens, and transformers drafts none: say model.engine: "
            "vllm",
        )
    if model is None or model.engine.name == "transformers" or not isinstance(assertion, MeasuredAssertion):
        return
    by_files = assertion.site == "weight" and model.weights == "files"
    recorded = model.reference is not None and _is_recorded(source, model.reference)
    if not by_files and (problem := unfit_for_vllm(assertion.request, recorded=recorded)) is not None:
        raise source.error(("assertions", index, "metric"), problem)
    if assertion.metric == "max_abs_diff" or (assertion.metric == "sqnr" and assertion.parameters.get("by") == "token"):
        raise source.error(
            ("assertions", index, "metric"),
            f"{assertion.metric} is of a single {'token' if assertion.metric == 'sqnr' else 'number'}, and two engines "
            "round a single one differently: gate sqnr of the tensor, nmse, relative_l2 or cosine in vLLM",
        )


def _check_loaded(source: YamlSource, model: Model | None, index: int, assertion: Assertion) -> None:
    """Check that a metric of what the loader made isn't asked of files that nothing loads."""
    if assertion.metric == "loaded_weights" and model is not None and model.weights == "files":
        raise source.error(
            ("assertions", index, "metric"),
            "loaded_weights holds a loaded model against its files, and with model.weights: files no weight is loaded: "
            "leave one of the two out",
        )


def _check_range(source: YamlSource, suite: Suite, index: int, assertion: Assertion) -> None:
    """Check that a range of positions begins within the windows of the suite's data; a fixture's may be longer."""
    span = PositionRange.parse(assertion.where) if isinstance(assertion, MeasuredAssertion) else None
    if span is not None and suite.model is not None and span.start >= suite.data.seq_len:
        raise source.error(
            ("assertions", index, "positions"),
            f"positions begin at {span.start:,}, and the data's windows have {suite.data.seq_len:,} tokens: raise "
            "data.seq_len, or begin earlier",
        )


def _check_dtype(source: YamlSource, model: Model | None, index: int, assertion: Assertion) -> None:
    """Check that no bound on activations lies beyond the largest number of the dtype that the suite asks for."""
    if model is None or model.dtype == "auto" or not isinstance(assertion, MeasuredAssertion):
        return
    if assertion.site != "weight" and (vacuous := assertion.vacuous(model.dtype)) is not None:
        raise source.error(("assertions", index, vacuous[0]), vacuous[1])


def _check_paths(source: YamlSource, suite: Suite) -> None:
    """Check that what a suite reads or writes lies where it may; what an override names may lie anywhere.

    Model, reference and last release may lie anywhere too: of these only a checkpoint's files are opened.
    """
    for location, named, path in _named_paths(source.path.parent, suite):
        if named in source.given:
            beside = [path.parent] if location[0] == "assertions" else []  # where the samples of an eval lie
            source.roots = replace(source.roots, allowed=(*source.roots.allowed, path, *beside))
        elif problem := source.boundary.problem(path, below=location[0] in ("data", "generation")):
            raise source.error(location, f"'{named}' {problem}")


def _named_paths(folder: Path, suite: Suite) -> Iterator[tuple[Location, str, Path]]:
    """Yield (key, text, path) of each path of a suite that is no checkpoint's."""
    hub_set, data = hub_set_of(suite.data), suite.data.source
    if (own := local_path(suite.data, folder)) is not None:
        yield ("data", "source"), data, own
    # `datasets` takes an id for a folder where there is one, relative to where one stands.
    elif hub_set is not None and Path(hub_set.repository).exists():
        yield ("data", "source"), data, Path.cwd() / hub_set.repository
    prompts = suite.generation.prompts if suite.generation is not None else ""
    if prompts.startswith("custom:"):
        yield ("generation", "prompts"), prompts, folder / Path(os.path.expanduser(prompts.removeprefix("custom:")))
    if suite.model is not None and suite.model.logprobs is not None:
        yield ("model", "logprobs"), suite.model.logprobs, folder / suite.model.logprobs
    reference = suite.model.reference if suite.model is not None else None
    if reference is not None and reference.endswith((".json", ".jsonl")):
        yield ("model", "reference"), reference, folder / reference
    yield (
        ("visualization", "save_dir"),
        suite.visualization.save_dir,
        folder / Path(os.path.expanduser(suite.visualization.save_dir)),
    )
    for index, assertion in enumerate(suite.assertions or ()):
        if isinstance(assertion, ExternalAssertion):
            for key in ("file", "reference"):
                if (named := getattr(assertion, key)) is not None:
                    # What replaces a placeholder is known when the file is read, and then it is checked again.
                    yield ("assertions", index, key), named, folder / named.replace(NAME_PLACEHOLDER, "name")


def _unknown_id(source: YamlSource, index: int) -> str:
    """Return a hint for an extending suite: an assertion without a metric may have meant one of a base."""
    if "extends" not in source.data:
        return ""
    entries = source.data["assertions"]
    others = [str(other.get("id")) for other in entries[:index] + entries[index + 1 :]]
    name = entries[index].get("id")
    return f": no suite that this one extends has an assertion '{name}'{did_you_mean(str(name), others)}"


def _explain(source: YamlSource, error: ValidationError, overridden: dict[Location, str]) -> SuiteError:
    """Turn the first of pydantic's errors into one line at the right place."""
    problems = error.errors(include_url=False)

    # A misspelt key also makes a field that is missing: the unknown key is the error to show.
    def order(problem: Any) -> tuple[bool, int]:
        return problem["type"] != "extra_forbidden", source.place(_location(source, problem["loc"])).line

    first = min(problems, key=order)
    cause = first.get("ctx", {}).get("error")
    location = _location(source, first["loc"])
    if isinstance(cause, SuiteError) and cause.key:
        location = (*location, cause.key)
    message = _message(first, location)
    override = next((text for key, text in overridden.items() if location[: len(key)] == key), None)
    if override is not None:
        return SuiteError(f"{override}: {message}")
    return source.error(location, message)


def _location(source: YamlSource, loc: tuple[int | str, ...]) -> Location:
    """Drop from a location what pydantic adds: the metric as the tag of an assertion, and the arms of unions."""
    # The third part is the tag of the union, which no line of the file has.
    if loc[:1] == ("assertions",) and len(loc) > 2:
        loc = (*loc[:2], *loc[3:])
    location: Location = ()
    for part in loc:
        # A key of the file may look like a tag of pydantic's.
        named = (*location, part) in source.places
        if named or isinstance(part, int) or ("[" not in part and part not in ("str", "float", "int")):
            location = (*location, part)
    return location


def _message(problem: Any, location: Location) -> str:
    key = location[-1] if location else "suite"
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"unknown key '{key}'{did_you_mean(str(key), _keys_at(location, problem['loc']))}"
    if kind == "missing":
        return f"the key '{key}' is missing"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "string_pattern_mismatch" and key == "id":
        return f"the id '{given}' may hold letters, digits and _ . - only"
    if kind == "literal_error":
        expected = problem["ctx"]["expected"]
        choices = re.findall(r"'([^']+)'", expected)
        return f"{key}: '{given}' is none of {expected}{did_you_mean(str(given), choices)}"
    if kind.startswith("union_tag"):
        return f"{key}: write a number, or what follows the last release, {{of: previous}}, not {given!r:.100}"
    what = str(problem["msg"]).removeprefix("Input ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        what = "should be a mapping of keys"  # pydantic speaks of instances of our classes
    if kind == "string_type" and isinstance(given, int | float):
        what = "should be a text, so put it in quotes"
    text = repr(given)
    return f"{key}: {what}, not {text if len(text) <= 100 else f'{text[:100]}…'}"


def _keys_at(location: Location, loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that may stand next to the last one of a location."""
    if location[:1] == ("assertions",) and len(loc) >= 4:
        return list(fields_at(ASSERTIONS[str(loc[2])], location[2:-1]))
    return list(fields_at(Suite, location[:-1]))
