"""The transformers integration. Import this module to open ClusComp folders with `from_pretrained`:

    import cluscomp_runtime.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("model-folder")

See `docs/hf-format.md`. Needs transformers 5.23 or newer; no other part of the runtime needs transformers.
"""

from cluscomp_runtime.hf.quantizer import ClusCompConfig, ClusCompQuantizer

__all__ = ["ClusCompConfig", "ClusCompQuantizer"]
