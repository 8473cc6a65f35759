"""Round-to-nearest (RTN) and GPTQ on uniform grids, by Intel's neural-compressor; see requirements-peers.txt.

Chosen because it is kept up, quantises on a CPU without a network and installs beside the torch and transformers of
`constraints.txt`: llm-compressor 0.14 asks for transformers 5.17 or older, GPTQModel 7.7 for torch 2.14.

Groups of `group_size` weights of a row share a scale (float16) and a zero point (as wide as a weight). With GPTQ, input
channels go in descending order of their energy (`act_order`), so which group a channel is in has to be stored too.
"""

from __future__ import annotations

import importlib
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from cluscomp_formats.ir import Model

__all__ = ["Grid", "check_gptq", "check_rtn", "gptq", "grid_bits", "huggingface_model", "round_to_nearest"]

Floats = npt.NDArray[np.float32]

SCALE_BITS = 16


@dataclass(frozen=True)
class Grid:
    """`bits` per weight; `group_size` weights of a row share a scale and a zero point."""

    method: Literal["rtn", "gptq"]
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.method.upper()} {self.bits} bits, groups of {self.group_size}"


def grid_bits(grid: Grid, shape: tuple[int, int]) -> int:
    """Bits of a matrix `(out_features, in_features)`: weights, scales, zero points, for GPTQ the group of each channel.

    Weights at their true width, closer than the library packs 3 bits: ten to a word of 32.
    """
    out_features, in_features = shape
    groups = math.ceil(in_features / grid.group_size)
    bits = out_features * (in_features * grid.bits + groups * (SCALE_BITS + grid.bits))
    if grid.method == "gptq":
        bits += in_features * (groups - 1).bit_length()
    return bits


def round_to_nearest(matrices: Mapping[str, Floats], grid: Grid) -> dict[str, Floats]:
    """Matrices `[out_features, in_features]`, each rounded to its grids and decoded."""
    library = _library()
    layers = torch.nn.ModuleList()
    for matrix in matrices.values():
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight.data = torch.tensor(matrix)
        layers.append(layer)
    config = library.RTNConfig(bits=grid.bits, group_size=grid.group_size, use_sym=False, use_layer_wise=False)
    with torch.no_grad():
        done = library.convert(library.prepare(torch.nn.ModuleDict({"layers": layers}), config)).layers
    return {name: layer.recover().float().numpy() for name, layer in zip(matrices, done, strict=True)}


def gptq(source: Model, names: Sequence[str], grid: Grid, windows: torch.Tensor) -> dict[str, Floats]:
    """The named matrices of a Hugging Face model, calibrated on `windows` `[windows, tokens]`, quantised and decoded."""
    library = _library()
    model = huggingface_model(source)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # It looks for a checkpoint on the network unless it is given some folder. Blocks as long as groups, so that the grid
        # of a group takes into account what the groups before it have erred.
        config = library.GPTQConfig(
            bits=grid.bits,
            group_size=grid.group_size,
            use_sym=False,
            act_order=True,
            block_size=grid.group_size,
            model_path=folder,
        )
        model = library.prepare(model, config)
        for window in windows:
            model(window[None])
        model = library.convert(model)
    return {name: model.get_submodule(name.removesuffix(".weight")).recover().float().numpy() for name in names}


def _library() -> Any:
    # Or the library does not look for transformers when it is imported, and misses it later.
    importlib.import_module("transformers")
    library = importlib.import_module("neural_compressor.torch.quantization")
    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    return library


def huggingface_model(source: Model) -> Any:
    """The model in transformers, in float32."""
    import transformers

    config = transformers.AutoConfig.for_model(**source.config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = model.load_state_dict({name: torch.tensor(t.decode()) for name, t in source.tensors.items()}, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}, found.missing_keys
    return model.eval()


def check_rtn(weight: Floats, decoded: Floats, grid: Grid) -> None:
    """Raises AssertionError unless `decoded` is `weight` `[out_features, in_features]` rounded to the nearest of its grid.

    The grid spans a group's range, zero included, in 2^bits - 1 steps; the zero point is a whole number, which moves the ends
    of the range by up to half a step, and the scale is stored in float16, which adds 2^-11 of the value.
    """
    for start in range(0, weight.shape[1], grid.group_size):
        group = weight[:, start : start + grid.group_size]
        low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
        step = (high - low) / (2**grid.bits - 1)
        error = np.abs(decoded[:, start : start + grid.group_size] - group).max(1)
        assert (error <= step + 2.0**-10 * np.maximum(high, -low)).all(), f"{grid.name} is off its grid"
    root_mean_square = float(np.sqrt(np.mean((decoded - weight) ** 2)))
    assert root_mean_square > 0, f"{grid.name} changed nothing"


def check_gptq(weight: Floats, gptq: Floats, rtn: Floats, inputs: torch.Tensor) -> None:
    """Raises AssertionError unless GPTQ errs less than RTN in the matrix's output on calibration `inputs` `[tokens, in]`."""
    errors: Mapping[str, float] = {
        name: float((inputs @ torch.from_numpy(decoded - weight).T).square().sum())
        for name, decoded in {"gptq": gptq, "rtn": rtn}.items()
    }
    assert errors["gptq"] < errors["rtn"], f"GPTQ misses its own objective: {errors}"
