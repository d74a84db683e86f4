"""`qsa schema`: the JSON Schema by which editors complete and check suites."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .codes import OK


def run(arguments: Sequence[str]) -> int:
    """Print the schema."""
    from ..suite import suite_schema

    argparse.ArgumentParser(prog="qsa schema", description="Print the JSON Schema of suites.").parse_args(arguments)
    print(json.dumps(suite_schema(), indent=2))
    return OK
