from .assertions import baseline_snapshot as baseline_snapshot, run_assertion as run_assertion
from .collection import Overrides as Overrides, QsaSuite as QsaSuite
from .fixtures import Qsa as Qsa, QsaBaseline as QsaBaseline
from .gate import Gate as Gate
from .hookspecs import HookSpecs as HookSpecs
from .options import Options as Options, add_options as add_options, read_options as read_options
from .outcomes import describe as describe
from .reporting import Reporter as Reporter
