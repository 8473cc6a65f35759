"""The transformers integration: importing this module lets `from_pretrained` open Hugging Face folders of ours.

    import cluscomp_runtime.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("model-folder")

See `docs/hf-format.md`. Needs transformers 5.23 or newer; nothing else in the runtime does.
"""

from cluscomp_runtime.hf.quantizer import ClusCompConfig, ClusCompQuantizer

__all__ = ["ClusCompConfig", "ClusCompQuantizer"]
