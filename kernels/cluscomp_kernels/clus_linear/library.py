"""The `cluscomp` operator library that the modules of this folder define their operators in.

`torch.library.Library` rather than `custom_op`: the wrapper of the latter costs 2 to 7 us more per call, and decoding one token
makes hundreds of calls.
"""

from __future__ import annotations

import torch

__all__ = ["LIBRARY"]

LIBRARY = torch.library.Library("cluscomp", "FRAGMENT")
