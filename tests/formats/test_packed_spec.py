"""The specification's tables match the code."""

import re
import struct
from pathlib import Path

from cluscomp_formats import limits
from cluscomp_formats.ir import CODEBOOK_DTYPES, DTYPES, FLOAT_DTYPES, MAX_CLUSTERS
from cluscomp_formats.packed import spec
from cluscomp_formats.sections import header, header_parsing
from cluscomp_formats.strict_json import MAX_DEPTH, parse_canonical

TEXT = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())


def table(first_header: str) -> list[list[str]]:
    """Return the rows of the table whose first column has this heading."""
    lines = TEXT.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_header} |")) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_preamble() -> None:
    types = {"8s": "8 bytes", "16s": "16 bytes", "I": "u32", "Q": "u64"}
    fields = [[name, str(offset), types[code]] for name, offset, code in spec.PREAMBLE_FIELDS]
    assert [row[:3] for row in table("field")] == fields
    offset = 0
    for _, stated, code in spec.PREAMBLE_FIELDS:
        assert stated == offset
        offset += struct.calcsize(f"<{code}")
    assert offset == spec.PREAMBLE_LENGTH == 64
    values = {row[0]: row[3] for row in table("field")}
    assert values["magic"].startswith(f"`{spec.MAGIC.hex(' ').upper()}`")
    assert values["version"] == str(spec.VERSION)
    assert f"at most {header.MAX_HEADER_LENGTH}" in values["header_length"]


def test_members() -> None:
    listed: dict[str, list[str]] = {}
    optional: dict[str, list[str]] = {}
    for owner, member, _ in table("object"):
        (optional if member.startswith("*") else listed).setdefault(owner, []).append(member.strip("*`"))
    assert listed == {
        "header": list(header_parsing.HEADER_MEMBERS),
        "section": list(header_parsing.SECTION_MEMBERS),
        "array": list(header_parsing.ARRAY_MEMBERS),
        "dense": list(header_parsing.DENSE_MEMBERS),
        "clustered": list(header_parsing.CLUSTERED_MEMBERS),
        "stage": list(header_parsing.STAGE_MEMBERS),
        "outliers": list(header_parsing.OUTLIERS_MEMBERS),
    }
    assert optional == {"clustered": list(header_parsing.CLUSTERED_OPTIONAL_MEMBERS)}
    kinds = {owner: value for owner, member, value in table("object") if member == "`kind`"}
    assert kinds == {kind: f'`"{kind}"`' for kind in header_parsing.KINDS}


def test_dtypes() -> None:
    rows = table("dtype")
    assert [(row[0], int(row[1])) for row in rows] == [(name, stored.itemsize) for name, stored in DTYPES.items()]
    assert tuple(row[0] for row in rows if row[2].startswith("float")) == FLOAT_DTYPES
    assert "dtype " + " or ".join(", ".join(CODEBOOK_DTYPES).rsplit(", ", 1)) in PROSE


def test_limits() -> None:
    assert f"1 <= num_clusters <= {MAX_CLUSTERS}" in PROSE
    assert f"1 to {limits.MAX_NAME_BYTES} bytes in UTF-8" in PROSE
    assert f"array of 0 to {limits.MAX_RANK} lengths" in PROSE
    assert f"nested at most {MAX_DEPTH} deep" in PROSE
    assert f"first multiple of {header.ALIGNMENT}" in PROSE


def test_examples_of_numbers_are_canonical() -> None:
    examples = re.search(r"above 15: (.*?) \(", PROSE)
    assert examples is not None
    numbers = re.findall(r"`([^`]+)`", examples.group(1))
    assert len(numbers) == 5
    for number in numbers:
        assert isinstance(parse_canonical(number.encode()), float)
