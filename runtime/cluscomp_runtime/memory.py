"""Whether a model fits the memory of the machine, and what the allocator makes of that.

A few bytes of codes may stand for a matrix of any size.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator

import torch

from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_formats.ir import DenseTensor, Model, Tensor

__all__ = [
    "check_memory",
    "device_bytes",
    "is_memory_fault",
    "memory_faults",
    "physical_bytes",
    "return_freed_arrays",
    "trim_heap",
]

_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""

_CPU_ALLOCATOR = re.compile(
    r"(?:\[enforce fail at alloc_cpu\.cpp:\d+\] [^.]*\. )?DefaultCPUAllocator: (?:can't allocate|not enough) memory"
)
"""How torch's allocator on the CPU begins its complaint, for which it has no type of its own."""

_REMEDY = 'use a machine with more memory, or kernel="reference", which holds one matrix at a time'


def check_memory(model: Model, kernel: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model whose matrices, as the runtime would hold them, exceed the machine's memory; asked on the CPU only.

    Raises UnsupportedError before anything is read: a system that grants more memory than it has would end the process later.
    """
    available = physical_bytes()
    if device.type != "cpu" or available is None:
        return
    decoded = kernel in ("dense", "reference") or dtype == torch.float64
    sizes = [_held_bytes(tensor, dtype.itemsize, decoded=decoded) for tensor in model.tensors.values()]
    needed = max(sizes, default=0) if kernel == "reference" else sum(sizes)
    if needed > available:
        message = "the model needs more memory than this machine has"
        found, expected = f"{needed / 1e9:.1f} GB for its matrices", f"at most {available / 1e9:.1f} GB"
        raise UnsupportedError(Problem("out_of_memory", message, None, None, found, expected, _REMEDY))


def return_freed_arrays() -> None:
    """Have glibc give arrays of 8 MB and more back to the system when they are freed, in this process from now on.

    Left to itself it soon takes arrays of up to 32 MB from its heap, of which it keeps all that lies before anything small that
    is still in use. Below 8 MB the heap is quicker. Does nothing on other systems.
    """
    if sys.platform.startswith("linux"):
        # Other C libraries for Linux have no such function.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 8 << 20)


def _held_bytes(tensor: Tensor, itemsize: int, *, decoded: bool) -> int:
    if isinstance(tensor, DenseTensor) or decoded or tensor.group_axis == "in":
        return tensor.num_weights * itemsize
    # Codes are laid out in one or two bytes each.
    return 2 * sum(stage.codes.size for stage in tensor.stages)


def trim_heap() -> None:
    """Have glibc give back all that is free in its heap now, which it keeps for later. Does nothing on other systems."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def physical_bytes() -> int | None:
    """Memory of the machine; None where the system does not say (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def device_bytes(device: str) -> int | None:
    """Memory of a GPU; None for what is none, or is not here."""
    name = re.fullmatch(r"cuda(?::(\d+))?", device)
    index = int(name[1] or 0) if name else 0
    if name is None or index >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(index).total_memory)


def is_memory_fault(error: BaseException) -> bool:
    """Whether an error says that memory was refused, on the host or a device.

    Told by its type or, for torch's allocator on the CPU, by how the text begins: a GPU's "illegal memory access" is the fault
    of a kernel.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and _CPU_ALLOCATOR.match(str(error)) is not None


@contextlib.contextmanager
def memory_faults(remedy: str = _REMEDY) -> Iterator[None]:
    """Make an UnsupportedError, with a `remedy`, of memory that the system or the device refuses."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_fault(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "no memory left")[:200]
        problem = Problem("out_of_memory", "there is not enough memory", found=reason, remedy=remedy)
        raise UnsupportedError(problem) from error
