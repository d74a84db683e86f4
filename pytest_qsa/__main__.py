"""`python -m pytest_qsa` is the program `qsa`."""

from .cli import main

raise SystemExit(main())
