"""A waiver in force is a warning; this project's own tests turn warnings into errors, its examples must not."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Keep our warnings what they are."""
    config.addinivalue_line("filterwarnings", "default::pytest_qsa.QsaWarning")
