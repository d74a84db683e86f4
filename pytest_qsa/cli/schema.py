"""Print the JSON Schema of suites, by which editors complete and check them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .shared import OK, command_parser


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    from ..suite import suite_schema

    command_parser(__name__, __doc__).parse_args(arguments)
    print(json.dumps(suite_schema(), indent=2))
    return OK
