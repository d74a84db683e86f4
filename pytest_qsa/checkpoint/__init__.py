"""Static checks: what the files of a checkpoint say, before any forward. numpy only; neither torch nor a model."""

from .checks import CHECKS, Check, Files, problems_of, query_of_check
from .folder import Folder, open_folder

__all__ = ["CHECKS", "Check", "Files", "Folder", "open_folder", "problems_of", "query_of_check"]
