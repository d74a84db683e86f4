__version__: str

from .captures import Capture as Capture
from .checkpoint import Format as Format
from .common import (
    AnomalyError as AnomalyError,
    BaselineError as BaselineError,
    InfraError as InfraError,
    QsaError as QsaError,
    QsaUnplannedCaptureWarning as QsaUnplannedCaptureWarning,
    QsaWarning as QsaWarning,
    SuiteError as SuiteError,
)
from .engine import capture as capture
from .metrics import Series as Series, View as View, metric as metric
