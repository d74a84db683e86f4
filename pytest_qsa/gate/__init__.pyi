from .assertions import (
    Qsa as Qsa,
    QsaBaseline as QsaBaseline,
    baseline_snapshot as baseline_snapshot,
    run_assertion as run_assertion,
)
from .collection import (
    Overrides as Overrides,
    QsaSuite as QsaSuite,
    not_for as not_for,
    split_by_model as split_by_model,
    suites_without_assertions as suites_without_assertions,
    uncollected as uncollected,
    unknown_assertions as unknown_assertions,
)
from .gate import Gate as Gate
from .manifest import collected as collected
from .options import (
    HookSpecs as HookSpecs,
    Options as Options,
    add_options as add_options,
    read_options as read_options,
    resembles_a_suite as resembles_a_suite,
)
from .reporting import describe as describe, require_reading as require_reading
from .summary import Reporter as Reporter
