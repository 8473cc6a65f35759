"""Readers of source models. Each turns a model on disk into the lazy IR, with tensors under their Hugging Face names."""

from cluscomp_export.sources.linears import embedding_tensor, head_tensor, kind, linear_tensors, logits_tensor
from cluscomp_export.sources.opening import CONFIG_ONLY, files_left_behind, open_source, source_bytes, source_files

__all__ = [
    "CONFIG_ONLY",
    "embedding_tensor",
    "files_left_behind",
    "head_tensor",
    "kind",
    "linear_tensors",
    "logits_tensor",
    "open_source",
    "source_bytes",
    "source_files",
]
