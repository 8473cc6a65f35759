"""Compile Triton kernels ahead of time for GPUs that are not there, and read what the machine code uses.

Run in a process without TRITON_INTERPRET: `@triton.jit` settles the mode at import.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Usage", "compile_kernel"]


class Usage(NamedTuple):
    """Registers and spilled bytes (local memory and stack) per thread, shared memory in bytes per block."""

    registers: int
    stack: int
    local: int
    shared: int


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], capability: int, num_warps: int = 4
) -> Usage:
    """Compile for a CUDA compute capability (87 is sm_87). Pointers and sizes are taken to be multiples of 16 bytes or 16.

    `signature` gives the type of each argument that is not constant ("*fp16", "i32"). Raises what triton raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if types[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    return _usage(compiled.asm["cubin"])


def _usage(cubin: bytes) -> Usage:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        printed = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {printed!r}")
    registers, stack, shared, local = (int(number) for number in found.groups())
    return Usage(registers, stack, local, shared)
