"""Operators on bare arrays and tensors, each a folder: reference, CPU, Triton, dispatch. Knows no file format."""
