"""GGUF files as a source: container, architectures, decoding, rotary scaling and tokenizer, a module for each."""

from cluscomp_export.sources.gguf.source import gguf_parts, is_gguf, model_of, read_gguf

__all__ = ["gguf_parts", "is_gguf", "model_of", "read_gguf"]
