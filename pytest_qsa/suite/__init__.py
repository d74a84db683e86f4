"""The suite: what a user writes, typed, validated, and traced to its line."""
