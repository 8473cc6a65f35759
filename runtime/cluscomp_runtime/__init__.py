"""The minimal runtime: load a codebook model and run it. On a CPU it imports numpy and tokenizers, and no torch."""

import cluscomp_kernels  # noqa: F401 - imported first: it configures torch's threads before torch is loaded
from cluscomp_runtime.generate import Generation, GenerationStream
from cluscomp_runtime.language_model import LanguageModel
from cluscomp_runtime.load import load
from cluscomp_runtime.selftest import SelfTestReport, make_self_test, run_self_test

__all__ = [
    "Generation",
    "GenerationStream",
    "LanguageModel",
    "SelfTestReport",
    "load",
    "make_self_test",
    "run_self_test",
]
