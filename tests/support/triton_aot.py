"""Compile Triton kernels ahead of time for GPUs that are not there, and read what the machine code uses.

The kernels must be imported without TRITON_INTERPRET: `@triton.jit` settles the mode at import.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Compiled", "Usage", "compile_kernel"]


class Usage(NamedTuple):
    """Registers and spilled bytes (local memory and stack) per thread, shared memory in bytes per block."""

    registers: int
    stack: int
    local: int
    shared: int


class Compiled(NamedTuple):
    """What the machine code uses, and the PTX it was made from."""

    usage: Usage
    ptx: str


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    fusion: bool = True,
    aligned: bool = True,
) -> Compiled:
    """Compile for a CUDA compute capability (87 is sm_87), with fused multiply-adds unless `fusion` is False.

    `signature` gives the type of each argument that is not constant ("*fp16", "i32"); `aligned` pointers are multiples of 16
    bytes. Raises what triton raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    pointers = [index for index, name in enumerate(kernel.arg_names) if types[name].startswith("*")]
    known = {(index,): [["tt.divisibility", 16]] for index in pointers} if aligned else {}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=known)
    options = {"num_warps": num_warps, "enable_fp_fusion": fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(_usage(compiled.asm["cubin"]), compiled.asm["ptx"])


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
