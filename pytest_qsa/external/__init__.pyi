from .evals import Wanted as Wanted, read_scores as read_scores
from .evals_compare import (
    Compared as Compared,
    compared as compared,
    conditions_of as conditions_of,
    folded as folded,
    widened as widened,
)
from .served.ask import bounded as bounded, capture_served as capture_served
