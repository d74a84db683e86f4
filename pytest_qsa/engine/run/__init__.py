"""The pass: hooks, forwards, and who takes part in them."""
