"""A number against a bound, a baseline, a reference or the last release → a verdict, and why."""
