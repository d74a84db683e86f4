"""A subject, from its name in a suite to its capture: load its model, run one pass, let the model go."""

from .capture import capture_subject, look_ahead, record_reference, with_files
from .data import subject_batches
from .in_transformers import capture_loaded
from .models import load_reference, load_subject

__all__ = [
    "capture_loaded",
    "capture_subject",
    "load_reference",
    "load_subject",
    "look_ahead",
    "record_reference",
    "subject_batches",
    "with_files",
]
