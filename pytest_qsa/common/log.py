"""The package's logger. `--log-cli-level=DEBUG` of pytest and `qsa -v` show its lines."""

import logging

logger = logging.getLogger("pytest_qsa")
"""Says at DEBUG what is hashed, whether a cached capture is used, why a pass starts again, and where the time goes."""
