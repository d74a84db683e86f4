from .evals import EvalFiles as EvalFiles, eval_scores as eval_scores, widened_bounds as widened_bounds
from .served_capture import bounded as bounded, capture_served as capture_served
