"""A whole suite, typed, and the JSON Schema by which editors complete and check one."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .assertion import AnyAssertion
from .sections import Data, Memory, Model, Strict, Visualization


class Suite(Strict):
    """A suite: a configuration of quant-smooth-ana, plus `assertions`. Without `model`, `qsa_model` is the subject.

    `extends` and `defaults` are applied before a suite is validated (inherit.py), so nothing else reads them.
    """

    extends: str | list[str] | None = None
    defaults: dict[str, Any] = Field(default={})
    model: Model | None = None
    data: Data = Data()
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
