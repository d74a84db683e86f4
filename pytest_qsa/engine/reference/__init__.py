"""A second model that the subject is compared with, live or kept in a file."""
