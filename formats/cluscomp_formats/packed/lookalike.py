"""Guess the type of a file that is not a packed model, so that the error can name a remedy."""

from __future__ import annotations

__all__ = ["describe", "is_mangled"]

_SIGNATURES: tuple[tuple[bytes, str, str | None], ...] = (
    (b"GGUF", "a GGUF file", None),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint or an .npz", None),
    (b"\x93NUMPY", "a NumPy array file", None),
    (b"\x1f\x8b", "a gzip archive", "decompress it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "decompress it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run git lfs pull"),
    (b"<", "an HTML or XML page, perhaps an error page saved by a download", "download the file again"),
    (b"{", "a JSON file", None),
    (bytes(8), "zeros: an incomplete write or download", "write or download it again"),
)
_PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def is_mangled(start: bytes) -> bool:
    """Return whether `start`, the first bytes of a file, are the packed format's magic, damaged by a transfer as text."""
    return start[:5] == b"\xc1CLUS" or start[:6] == b"\xc3\x81CLUS" or start[:7] == b"\xef\xbf\xbdCLUS"


def describe(start: bytes) -> tuple[str, str | None]:
    """Return the type of a file by its first bytes (24 are enough), and a remedy."""
    if is_mangled(start):
        return "a packed model damaged by a transfer as text", "transfer it again in binary mode"
    for signature, description, remedy in _SIGNATURES:
        if start.startswith(signature):
            return description, remedy
    if start[:2] in _PICKLE:
        return "a Python pickle, perhaps an old PyTorch checkpoint", None
    # safetensors: a little-endian 64-bit header length, then a JSON object.
    if start[8:9] == b"{" and start[5:8] == bytes(3):
        return "a safetensors file", None
    return f"bytes {start[:8].hex(' ')}", None
