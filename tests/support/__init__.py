"""What the tests of all rooms share: checkpoints, users' projects, models, and the same numbers by numpy."""
