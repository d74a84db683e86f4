"""The text that ships with the package, so that a first gate runs offline."""
