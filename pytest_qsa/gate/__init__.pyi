from .assertions import (
    Qsa as Qsa,
    QsaBaseline as QsaBaseline,
    baseline_snapshot as baseline_snapshot,
    run_assertion as run_assertion,
)
from .collection import Overrides as Overrides, QsaSuite as QsaSuite, unknown_assertions as unknown_assertions
from .gate import Gate as Gate
from .manifest import collected as collected
from .options import (
    HookSpecs as HookSpecs,
    Options as Options,
    add_options as add_options,
    read_options as read_options,
)
from .reporting import Reporter as Reporter, describe as describe
