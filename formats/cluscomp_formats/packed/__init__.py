"""The packed format (`.clus`): a single checksummed, mappable file; specified in `docs/packed-format.md`."""

from cluscomp_formats.format import Format
from cluscomp_formats.packed.reader import looks_packed, open_packed, read_header
from cluscomp_formats.packed.writer import packed_size, write_packed
from cluscomp_formats.sections.header import PackedHeader
from cluscomp_formats.sections.payload_stream import WriteReport

__all__ = ["FORMAT", "PackedHeader", "WriteReport", "looks_packed", "open_packed", "read_header", "write_packed"]

FORMAT = Format("packed", "a single packed file (.clus)", looks_packed, open_packed, write_packed, size=packed_size)
