"""Measurements of a source model on a calibration text."""
