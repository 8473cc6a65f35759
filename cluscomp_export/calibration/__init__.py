"""Texts that a source is run on, and what is measured there."""
