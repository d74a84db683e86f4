"""What the installed classes take for settings that a config.json doesn't state: a program of its own.

`python -m pytest_qsa.engine.load.settings CONFIG…` prints a JSON list with the name of the class and its settings for
each file, null where no installed class reads it. In a process of its own, for transformers' classes import torch,
which static checks do without. The code of a checkpoint is never run: only classes of transformers are looked up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def resolved(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the name of the class for a configuration and all of its settings; None where there is none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return None
    # The quantizer's section is no matter of the class, and may name a library that isn't here.
    stated = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        read = CONFIG_MAPPING[kind].from_dict(stated)
        return {"name": type(read).__name__, "settings": read.to_dict()}
    except Exception:  # whatever a class raises of settings that it can't take: the load will say so
        return None


def print_resolved(files: list[str]) -> None:
    """Print what the files come to."""
    configs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    print(json.dumps([resolved(config) for config in configs], default=str))


if __name__ == "__main__":
    print_resolved(sys.argv[1:])
