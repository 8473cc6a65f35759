"""Operators on bare arrays and tensors, each a folder: reference, CPU, Triton, dispatch. Knows no file format."""

import os
import sys

if "torch" not in sys.modules:
    # torch's OpenMP threads poll between its operations and take the cores from ours: decoding is a third slower then. The
    # OpenMP runtime reads this once, when torch loads it. `threads` has what is done where that is past.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
