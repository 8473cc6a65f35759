"""llama.cpp's own quantisers, called in the prebuilt library of npm's node-llama-cpp (`make programs`; Linux on x86-64).

The structures are those of `include/llama.h` and `ggml/include/ggml.h` at the release the lock file pins; what the library
says its defaults are is held against them, so that a library with other structures is refused.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

__all__ = ["LIBRARIES", "Ggml", "check_blocks"]

LIBRARIES = Path(__file__).parent.parent / "tests/programs/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"

Floats = npt.NDArray[np.float32]
Type = gguf.GGMLQuantizationType

_TYPE_COUNT_LEAST = max(Type) + 1
_FLOATS = ctypes.POINTER(ctypes.c_float)


class _Importance(ctypes.Structure):
    """`llama_model_imatrix_data`."""

    _fields_ = (("name", ctypes.c_char_p), ("data", _FLOATS), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_Importance)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


class _Traits(ctypes.Structure):
    """`ggml_type_traits`, up to what is used."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, _FLOATS, ctypes.c_int64)),
    )


class Ggml:
    """The library in `folder`. Raises SystemExit if it is not there or its structures are not those known here."""

    def __init__(self, folder: Path = LIBRARIES) -> None:
        path = next(folder.glob("libllama.v*.so"), None)
        if path is None:
            raise SystemExit(f"no llama.cpp in {folder}: make programs (needs npm, Linux on x86-64)")
        self.release = path.name.removeprefix("libllama.").removesuffix(".so")
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        backends = ctypes.CDLL(str(next(folder.glob("libggml.v*.so"))), mode=ctypes.RTLD_GLOBAL)
        self._llama = ctypes.CDLL(str(path))
        self._base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._base.ggml_quantize_chunk.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, *[ctypes.c_int64] * 3, _FLOATS]
        self._base.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        self._llama.llama_model_quantize_default_params.restype = _Parameters
        self._llama.llama_model_quantize.restype = ctypes.c_uint32
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._llama.llama_log_set(self._quiet, None)
        backends.ggml_backend_load_all_from_path(os.fsencode(folder))
        self._check_structures()

    def _check_structures(self) -> None:
        found = self._llama.llama_model_quantize_default_params()
        count = found.output_tensor_type
        sound = (found.nthread, found.ftype, found.quantize_output_tensor) == (0, gguf.LlamaFileType.MOSTLY_Q8_0, True)
        sound &= count == found.token_embedding_type and _TYPE_COUNT_LEAST <= count < 2 * _TYPE_COUNT_LEAST
        sound &= not (found.imatrix or found.kv_overrides or found.tt_overrides or found.prune_layers)
        sound &= 2**20 <= found.max_buf_size <= 2**40
        for type_ in (Type.Q4_0, Type.Q2_K, Type.IQ2_XXS):
            traits = self._base.ggml_get_type_traits(int(type_)).contents
            sound &= (traits.blck_size, traits.type_size) == gguf.GGML_QUANT_SIZES[type_]
        if not sound:
            raise SystemExit(f"llama.cpp {self.release} has other structures than benchmarks/ggml.py knows")

    def quantize(self, values: Floats, type_: Type, importance: Floats | None = None) -> npt.NDArray[np.uint8]:
        """The blocks of `values` float32 `[count]`, taken for one row. `importance` weights each value's squared error."""
        block, size = gguf.GGML_QUANT_SIZES[type_]
        if values.ndim != 1 or len(values) % block:
            raise ValueError(f"{type_.name} takes whole blocks of {block}, got {values.shape}")
        values = np.ascontiguousarray(values, dtype=np.float32)
        stored = np.zeros(len(values) // block * size, dtype=np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
        if weights is not None and weights.shape != values.shape:
            raise ValueError(f"importance is {weights.shape}, the values are {values.shape}")
        pointer = None if weights is None else weights.ctypes.data_as(_FLOATS)
        written = self._base.ggml_quantize_chunk(
            int(type_), values.ctypes.data_as(_FLOATS), stored.ctypes.data, 0, 1, len(values), pointer
        )
        assert written == len(stored), f"{type_.name}: ggml wrote {written} bytes of {len(stored)}"
        return stored

    def dequantize(self, stored: npt.NDArray[np.uint8], type_: Type) -> Floats:
        """float32 `[count]` of blocks, by ggml's own decoder."""
        block, size = gguf.GGML_QUANT_SIZES[type_]
        values = np.full(len(stored) // size * block, np.nan, dtype=np.float32)
        traits = self._base.ggml_get_type_traits(int(type_)).contents
        traits.to_float(stored.ctypes.data, values.ctypes.data_as(_FLOATS), len(values))
        return values

    def quantize_file(
        self, source: Path, output: Path, file_type: gguf.LlamaFileType, importance: Mapping[str, Floats] | None, threads: int
    ) -> None:
        """What `llama-quantize` makes of a GGUF file. `importance` float32 `[in_features]` goes by names of its tensors."""
        parameters = self._llama.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = int(file_type), threads
        items = [
            _Importance(name.encode(), values.ctypes.data_as(_FLOATS), len(values))
            for name, values in (importance or {}).items()
        ]
        if importance:
            parameters.imatrix = (_Importance * (len(items) + 1))(*items, _Importance())
        failed = self._llama.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(parameters))
        if failed:
            raise SystemExit(f"llama.cpp does not make {file_type.name} of {source}")


def check_blocks(blocks: npt.NDArray[np.uint8], decoded: Floats, type_: Type) -> None:
    """Raises AssertionError unless gguf-py decodes the blocks to the same bits."""
    other = gguf.quants.dequantize(blocks, type_).reshape(decoded.shape)
    assert np.array_equal(other, decoded), f"gguf-py and ggml decode {type_.name} differently"
