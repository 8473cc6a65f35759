"""Decoder families: one file for each says what a decoder is made of, and everything else follows from that.

`describe(config)` gives the `DecoderDescription` (`description.py`) of a model with that `config.json`. A family is a file like
`llama.py`: a function that reads the fields of the configuration with a `ConfigReader` and gives the description, and a
`FAMILIES` tuple that names the values of `model_type` it serves. `registry.py` lists the files. To add one:

1. write the file; take from `parts.py` what is named as in Llama, and refuse by name every field of the configuration that
   could change the result and that the description does not carry;
2. name its module in `registry.py`;
3. add a row to `tests/test_families.py`, which holds the family against transformers.

Only an operation that no family has had before needs more: a class in `description.py`, and its meaning in
`cluscomp_runtime.decoder` and `cluscomp_export.onnx_graph.decoder`. For dense GGUF files, whose keys are llama.cpp's, the
architecture is also named in `cluscomp_formats.gguf.hyperparameters`, with what llama.cpp computes otherwise.
"""

from cluscomp_formats.architectures.description import (
    Activation,
    Attention,
    Block,
    Branch,
    DecoderDescription,
    Experts,
    FeedForward,
    Linear,
    Norm,
    Rope,
    Step,
    TensorSpec,
)
from cluscomp_formats.architectures.family import Family
from cluscomp_formats.architectures.registry import FAMILIES, describe, describe_loosely, find_family
from cluscomp_formats.architectures.tensor_check import check_tensors

__all__ = [
    "FAMILIES",
    "Activation",
    "Attention",
    "Block",
    "Branch",
    "DecoderDescription",
    "Experts",
    "Family",
    "FeedForward",
    "Linear",
    "Norm",
    "Rope",
    "Step",
    "TensorSpec",
    "check_tensors",
    "describe",
    "describe_loosely",
    "find_family",
]
