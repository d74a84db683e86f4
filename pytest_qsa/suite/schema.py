"""The JSON Schema of suite files, by which editors complete and check what someone writes."""

from __future__ import annotations

from typing import Any

from .sections import Suite

PARTIAL = "PartialAssertion"


def suite_schema() -> dict[str, Any]:
    """Return the schema of a file: whole assertions, unless it extends a suite or has defaults that complete them."""
    schema = Suite.model_json_schema()
    properties, definitions = schema["properties"], schema["$defs"]
    whole = next(arm for arm in properties["assertions"]["anyOf"] if arm.get("type") == "array")
    models = [definitions[arm["$ref"].rpartition("/")[2]] for arm in whole["items"]["oneOf"]]
    definitions[PARTIAL] = _partial(models)
    partial = {"$ref": f"#/$defs/{PARTIAL}"}
    by_id = {"type": "object", "additionalProperties": {"anyOf": [partial, {"type": "null"}]}}
    properties["assertions"] = {
        "title": "Assertions", "description": "A list, or a mapping of ids, in which null takes out a base's assertion",
    }  # fmt: skip
    properties["defaults"] = {**partial, "description": "What all assertions share"}
    entries = {"type": "array", "items": {"allOf": [partial, {"required": ["id"]}]}}
    return {
        **schema,
        "if": {"anyOf": [{"required": ["extends"]}, {"required": ["defaults"]}]},
        "then": {"properties": {"assertions": {"anyOf": [entries, by_id]}}},
        "else": {"properties": {"assertions": {"anyOf": [whole, by_id]}}},
    }


def _partial(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of an assertion of which another file or the defaults say the rest."""
    properties: dict[str, list[Any]] = {}
    for model in models:
        for name, schema in model["properties"].items():
            known = properties.setdefault(name, [])
            known += [schema] if schema not in known else []
    nullable = {name: {"anyOf": [*schemas, {"type": "null"}]} for name, schemas in properties.items()}
    description = "The keys of an assertion that stand here; null takes out what a base or the defaults say"
    return {"type": "object", "description": description, "properties": nullable, "additionalProperties": False}
