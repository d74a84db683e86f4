"""All faults of the self-test: those that break checkpoints in the field, and that no loader notices."""

from __future__ import annotations

from .fault import Fault
from .file_faults import FILE_FAULTS
from .order_faults import ORDER_FAULTS
from .tensor_faults import TENSOR_FAULTS

FAULTS: dict[str, Fault] = TENSOR_FAULTS | ORDER_FAULTS | FILE_FAULTS
