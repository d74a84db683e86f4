"""Static checks: what the files of a checkpoint say, before any forward. numpy only; neither torch nor a model."""
