"""The Hugging Face format: a model folder that transformers can open; specified in `docs/hf-format.md`."""

import functools

from cluscomp_formats.files.atomic_folder import check_output_folder
from cluscomp_formats.format import Format
from cluscomp_formats.hf.reader import holds_only_model, looks_hf, open_hf
from cluscomp_formats.hf.writer import SHARD_BYTES, hf_size, write_hf
from cluscomp_formats.sections.payload_stream import WriteReport

__all__ = ["FORMAT", "SHARD_BYTES", "WriteReport", "holds_only_model", "looks_hf", "open_hf", "write_hf"]

FORMAT = Format(
    "hf",
    "a Hugging Face model folder with codebooks",
    looks_hf,
    open_hf,
    write_hf,
    functools.partial(check_output_folder, replaceable=holds_only_model),
    hf_size,
)
