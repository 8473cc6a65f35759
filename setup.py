"""Build the native CPU kernels: plain shared libraries, loaded through ctypes.

The libraries use no Python, numpy or torch header, so they need only a C compiler. Where there is none the build goes on
without them and the kernels announce the slower path they take instead. With CLUSCOMP_REQUIRE_NATIVE=1, which CI sets, the
build fails.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("kernels/cluscomp_kernels")
ENGINE = KERNELS / "engine"
GNU_FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
# The engine gives the same bits on every instruction set, so the compiler must not fuse products with sums. Vectors that are
# longer than registers are passed to inlined functions only, so their calling convention does not matter.
ENGINE_FLAGS = [*GNU_FLAGS, "-ffp-contract=off", "-Wno-psabi"]


def library(name: str, sources: list[Path], flags: list[str]) -> Extension:
    windows = sys.platform == "win32"
    return Extension(
        f"cluscomp_kernels.{name}",
        sources=sorted(path.as_posix() for path in sources),
        depends=sorted(path.as_posix() for path in KERNELS.rglob("*.h")),
        include_dirs=[KERNELS.as_posix()],
        extra_compile_args=["/O2", "/std:c11"] if windows else flags,
        extra_link_args=[] if windows else ["-pthread", "-lm"],
        optional=os.environ.get("CLUSCOMP_REQUIRE_NATIVE") != "1",
    )


engine = list(ENGINE.glob("*.c"))
others = [path for path in KERNELS.rglob("*.c") if path not in engine]
setup(ext_modules=[library("_native", others, GNU_FLAGS), library("_engine", engine, ENGINE_FLAGS)])
