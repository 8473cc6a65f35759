"""Delta files: the values that a training changed."""
