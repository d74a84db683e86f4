"""Print the JSON Schema of suites, by which editors complete and check them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .. import suite
from .shared import OK, command_parser

EXAMPLES = ("qsa schema > qsa.schema.json",)


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    command_parser(__name__, __doc__, examples=EXAMPLES).parse_args(arguments)
    print(json.dumps(suite.suite_schema(), indent=2))
    return OK
