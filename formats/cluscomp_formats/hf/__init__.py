"""The Hugging Face format: a model folder transformers opens; specified in `docs/hf-format.md`."""

from cluscomp_formats.hf.reader import holds_only_model, looks_hf, open_hf
from cluscomp_formats.hf.writer import SHARD_BYTES, write_hf
from cluscomp_formats.packed.payload_stream import WriteReport
from cluscomp_formats.registry import Format, register

__all__ = ["SHARD_BYTES", "WriteReport", "holds_only_model", "looks_hf", "open_hf", "write_hf"]

register(Format("hf", "a Hugging Face model folder with codebooks", looks_hf, open_hf))
