"""Build the native CPU kernels: one plain shared library, loaded through ctypes.

The library uses no Python, numpy or torch header, so it needs only a C compiler. Where there is none the build goes on
without it and the kernels announce the slower path they take instead. With CLUSCOMP_REQUIRE_NATIVE=1, which CI sets, the build
fails.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("kernels/cluscomp_kernels")
SOURCES = sorted(path.as_posix() for path in KERNELS.rglob("*.c"))
HEADERS = sorted(path.as_posix() for path in KERNELS.rglob("*.h"))
GNU_FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]

setup(
    ext_modules=[
        Extension(
            "cluscomp_kernels._native",
            sources=SOURCES,
            depends=HEADERS,
            include_dirs=[KERNELS.as_posix()],
            extra_compile_args=["/O2", "/std:c11"] if sys.platform == "win32" else GNU_FLAGS,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread", "-lm"],
            optional=os.environ.get("CLUSCOMP_REQUIRE_NATIVE") != "1",
        )
    ]
)
