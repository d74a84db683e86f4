"""A second model that the subject is compared with: one that runs, or one that was recorded to a file."""
