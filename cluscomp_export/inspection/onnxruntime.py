"""Run an ONNX folder in onnxruntime, as a user would: to verify that it computes the same there, and to measure."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluscomp_formats.errors import Problem, UnsupportedError
from cluscomp_formats.onnx.spec import MODEL_FILE, SUBFOLDER

__all__ = ["COMPACT", "OnnxSession"]

COMPACT = ("optimization.constant_folding_max_output_size_in_bytes", "65536")
"""The session option that keeps onnxruntime from decoding all weights when it loads a file."""

Cache = list[npt.NDArray[np.float32]]


class OnnxSession:
    """A decoder with key-value cache in onnxruntime, on the CPU. Keeps no state between calls.

    By default onnxruntime decodes all weights when it loads the file. `compact` keeps them as codes and decodes them at every
    call. With `threads=None`, onnxruntime chooses. Raises UnsupportedError if onnxruntime is not installed, or if the
    graph is not a decoder of token ids.
    """

    def __init__(self, path: Path, *, compact: bool = False, threads: int | None = None) -> None:
        if find_spec("onnxruntime") is None:
            remedy = "pip install onnxruntime"
            raise UnsupportedError(Problem("no_onnxruntime", "onnxruntime is not installed", str(path), remedy=remedy))
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Otherwise it warns of constants that are not folded, which is intended.
        options.log_severity_level = 3
        if compact:
            options.add_session_config_entry(*COMPACT)
        if threads is not None:
            options.intra_op_num_threads = threads
        file = path / SUBFOLDER / MODEL_FILE if path.is_dir() else path
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self._cache_shapes = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}
        self._others = inputs.keys() - self._cache_shapes.keys()
        outputs = [value.name for value in self.session.get_outputs()]
        self._outputs = ["logits", *(name.replace("past_key_values.", "present.") for name in self._cache_shapes)]
        if not self._others <= {"input_ids", "attention_mask", "position_ids"} or not set(self._outputs) <= set(outputs):
            found, expected = ", ".join(sorted(inputs)), "input_ids and a key-value cache"
            raise UnsupportedError(Problem("no_decoder", "not a graph of a decoder", str(path), None, found, expected))

    def step(self, input_ids: npt.NDArray[np.int64], cache: Cache | None = None) -> tuple[npt.NDArray[np.float32], Cache]:
        """Logits `[batch, tokens, vocab_size]` of `input_ids [batch, tokens]`, which continue the cache, and the new cache."""
        batch, tokens = input_ids.shape
        if cache is None:
            cache = [np.zeros((batch, shape[1], 0, shape[3]), np.float32) for shape in self._cache_shapes.values()]
        past = cache[0].shape[2] if cache else 0
        feeds: dict[str, Any] = dict(zip(self._cache_shapes, cache, strict=True))
        feeds["input_ids"] = input_ids
        feeds["attention_mask"] = np.ones((batch, past + tokens), np.int64)
        feeds["position_ids"] = np.broadcast_to(np.arange(past, past + tokens), (batch, tokens))
        wanted = self._others | self._cache_shapes.keys()
        logits, *present = self.session.run(self._outputs, {name: feeds[name] for name in feeds if name in wanted})
        return logits, present

    def forward(self, input_ids: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[np.float32]:
        """Logits `[batch, tokens, vocab_size]` for `input_ids` `[batch, tokens]`."""
        return self.step(input_ids.astype(np.int64))[0]

    def forward_cached(self, ids: Sequence[int], first: int) -> npt.NDArray[np.float32]:
        """Logits `[tokens, vocab_size]`: of the first `first` tokens together, then token by token."""
        row = np.array([list(ids)], np.int64)
        logits, cache = self.step(row[:, :first])
        parts = [logits]
        for index in range(first, row.shape[1]):
            logits, cache = self.step(row[:, index : index + 1], cache)
            parts.append(logits)
        whole: npt.NDArray[np.float32] = np.concatenate(parts, axis=1)[0]
        return whole

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The greedy continuation of `prompt`, token ids."""
        step, cache, tokens = np.array([list(prompt)], np.int64), None, []
        for _ in range(new_tokens):
            logits, cache = self.step(step, cache)
            tokens.append(int(logits[0, -1].argmax()))
            step = np.array([tokens[-1:]], np.int64)
        return tokens
