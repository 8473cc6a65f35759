"""GGUF files: *native* ones store a codebook model with our own keys, *dense* ones are for stock llama.cpp.

See `docs/gguf-format.md`.
"""

from cluscomp_formats.format import Format
from cluscomp_formats.gguf.dense_writer import (
    DENSE_TYPES,
    DenseReport,
    dense_format,
    dense_gguf_notes,
    dense_gguf_size,
    write_dense_gguf,
)
from cluscomp_formats.gguf.reader import looks_gguf, open_gguf
from cluscomp_formats.gguf.writer import gguf_size, write_gguf

__all__ = [
    "DENSE_TYPES",
    "FORMAT",
    "DenseReport",
    "dense_format",
    "dense_gguf_notes",
    "dense_gguf_size",
    "looks_gguf",
    "open_gguf",
    "write_dense_gguf",
    "write_gguf",
]

FORMAT = Format("gguf", "a GGUF file of a codebook model (.gguf)", looks_gguf, open_gguf, write_gguf, size=gguf_size)
