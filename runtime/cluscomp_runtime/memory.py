"""Memory of the machine: check that a model fits, return freed memory, and convert allocation errors.

The check is needed because a small file can describe a matrix of any size.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable, Iterator

from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_formats.ir import Model, Tensor

__all__ = [
    "check_memory",
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
"""Beginning of the message of torch's CPU allocator, which has no exception type of its own."""

_REMEDY = 'use a machine with more memory, or kernel="reference", which holds one matrix at a time'


def check_memory(model: Model, held_bytes: Callable[[Tensor], int], *, one_at_a_time: bool = False) -> None:
    """Raise UnsupportedError if the tensors, of which the runtime holds `held_bytes`, exceed the machine's memory.

    With `one_at_a_time`, memory holds one of them only. The check runs before anything is read, because a system that
    overcommits memory would kill the process later.
    """
    available = physical_bytes()
    sizes = [held_bytes(tensor) for tensor in model.tensors.values()]
    needed = max(sizes, default=0) if one_at_a_time else sum(sizes)
    if needed > available:
        message = "the model needs more memory than this machine has"
        found, expected = f"{needed / 1e9:.1f} GB for its matrices", f"at most {available / 1e9:.1f} GB"
        raise UnsupportedError(Problem("out_of_memory", message, None, None, found, expected, _REMEDY))


def return_freed_arrays() -> None:
    """Make glibc return arrays of 8 MB or more to the system when they are freed, from now on in this process.

    By default, glibc comes to allocate arrays of up to 32 MB from its heap, and it cannot return heap memory below a small
    block that is still in use. Below 8 MB the heap is faster. Does nothing on other systems.
    """
    if sys.platform.startswith("linux"):
        # Other C libraries for Linux do not have mallopt.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 8 << 20)


def trim_heap() -> None:
    """Make glibc return the free memory of its heap to the system. Does nothing on other systems."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def physical_bytes() -> int:
    """Return the bytes of memory of the machine."""
    import psutil

    return int(psutil.virtual_memory().total)


def is_memory_fault(error: BaseException) -> bool:
    """Return whether an error is a failed allocation, on the host or a device.

    The test is by type or, for torch's CPU allocator, by the beginning of the message. A mention of memory is not sufficient: a
    GPU's "illegal memory access" is a bug in a kernel.
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return type(error) is RuntimeError and _CPU_ALLOCATOR.match(str(error)) is not None


@contextlib.contextmanager
def memory_faults(remedy: str = _REMEDY) -> Iterator[None]:
    """Convert failed allocations in the block to UnsupportedError with a `remedy`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_fault(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "no memory left")[:200]
        problem = Problem("out_of_memory", "there is not enough memory", found=reason, remedy=remedy)
        raise UnsupportedError(problem) from error
