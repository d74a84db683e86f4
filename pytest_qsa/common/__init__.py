"""Errors, files, text and progress: what every room uses and none owns."""
