from .evals import EvalFiles as EvalFiles, eval_scores as eval_scores, widened_bounds as widened_bounds
from .logprobs import bounded as bounded
from .served_capture import capture_served as capture_served
