"""The specification's tables match the code."""

from pathlib import Path

from cluscomp_formats.hf import SHARD_BYTES, quantization, reader, spec
from cluscomp_formats.safetensors import spec as safetensors
from cluscomp_formats.sections import stored_arrays
from cluscomp_formats.sections.payloads import Payload
from cluscomp_formats.strict_json import MAX_DEPTH

TEXT = (Path(__file__).parents[2] / "docs" / "hf-format.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())


def table(*headings: str) -> list[list[str]]:
    """Return the rows of the table with these columns."""
    lines = TEXT.splitlines()
    start = lines.index(f"| {' | '.join(headings)} |") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def members(owner: str) -> tuple[list[str], list[str]]:
    names = [row[1] for row in table("object", "member", "value") if row[0] == owner]
    required = [name.strip("`") for name in names if not name.startswith("*")]
    return required, [name.strip("*`") for name in names if name.startswith("*")]


def test_members() -> None:
    assert members("quantization_config") == (sorted(quantization.MEMBERS), sorted(quantization.OPTIONAL_MEMBERS))
    assert members("weight") == (sorted(quantization.WEIGHT_MEMBERS), [])
    values = {row[1].strip("*`"): row[2] for row in table("object", "member", "value")}
    assert values["quant_method"] == f'`"{spec.METHOD}"`'
    assert values["version"] == str(spec.VERSION)
    named = [values["extra_arrays"].index(f"`{part}`") for part in quantization.EXTRA_ARRAYS]
    assert sorted(named) == named
    assert all(f"`{member}`" in PROSE for member in reader.RECORD_MEMBERS)


def test_files() -> None:
    names = [row[0].strip("`") for row in table("file", "content")]
    assert set(spec.OWN_FILES) < set(names)


def test_arrays() -> None:
    stated = " ".join(row[0] for row in table("array", "dtype, shape"))
    assert f"`{stored_arrays.codebook_key('<name>')}`" in stated
    assert f"`{stored_arrays.part_key('<module>.weight', 'codes')}`" in stated
    assert f"`{stored_arrays.part_key('<module>.weight', 'codes', 1)}`" in stated
    assert all(f"`{stored_arrays.part_key('<module>.weight', part)}`" in stated for part in quantization.EXTRA_ARRAYS)
    assert f"`{' '.join(safetensors.STORED_NAMES.values())}`" in PROSE
    assert stored_arrays.codes_spec(Payload("w", "codes", "uint16", (4, 6), code_bits=16)) == ("uint16", (4, 6))
    assert stored_arrays.codes_spec(Payload("w", "codes", "uint16", (4, 6), code_bits=15)) == ("uint8", (45,))


def test_limits() -> None:
    assert f"at most {reader.MAX_JSON_BYTES} bytes" in PROSE
    assert f"at most {MAX_DEPTH} deep" in PROSE
    assert f"{SHARD_BYTES // 10**9} GB unless asked otherwise" in PROSE
