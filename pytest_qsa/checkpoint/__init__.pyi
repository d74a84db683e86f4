from .checks.health import (
    CHECKS as CHECKS,
    Check as Check,
    Files as Files,
    problems_of as problems_of,
    query_of_check as query_of_check,
)
from .findings import Finding as Finding
from .folder import INDEX as INDEX, NUMBER as NUMBER, Folder as Folder, open_folder as open_folder
from .formats.declared import (
    codes_of as codes_of,
    declared as declared,
    element_count as element_count,
    matches as matches,
    scale_parts as scale_parts,
    weight_shape as weight_shape,
)
from .formats.dequantize import weight_rows as weight_rows
from .smoothing import Compare as Compare, Relation as Relation, compare_norms as compare_norms
from .tensors import FLOATS as FLOATS, Tensor as Tensor, encoded as encoded, tensors_of as tensors_of
