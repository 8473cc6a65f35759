"""Operators on plain arrays and tensors, one folder each: reference, CPU and Triton kernels, dispatch. No file formats."""

import os
import sys

if "torch" not in sys.modules:
    # torch's OpenMP threads poll for work after each operation and compete with the kernels' threads for the cores, which
    # makes decoding a third slower. OpenMP reads this variable once, when torch loads it; `threads.py` handles a torch that
    # was loaded earlier.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
