"""Changes to files that know their structure: what a checksum or length would catch is repaired, so that the lie gets through.

Everything random comes from a `Random` that is passed in: hypothesis, atheris and a seed can all drive it.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from fuzzing.containers import (
    GgufParts,
    GgufTensor,
    PackedParts,
    compact,
    join_members,
    join_safetensors,
    seal_delta,
    seal_packed,
    split_members,
    split_safetensors,
)

Mutation = Callable[[bytes, Random], bytes]

NUMBERS = [0, 1, 2, 3, 7, -1, 63, 64, 65, 255, 256, 65535, 65536, 65537, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1]
NUMBERS += [2**63, 2**64 - 1, 2**64, 10**30, 0.5, 1.0, 1e-45, 1e-300, 1e300, -0.0, float("inf"), float("nan")]
TEXTS = ["", "a", "..", "../x", "/etc/passwd", "a" * 300, "a" * 600, "\x1b[31m", "\u202e", "\ud800", "\x00", "\U0010ffff"]
TEXTS += ["out", "in", "dense", "clustered", "float64", "bfloat16", "bool", "uint64", "uint8", "F64", "BOOL", "F8_E4M3"]
TEXTS += ["model.safetensors", "config.json", "x.safetensors", "llama", "qwen2", "qwen3", "mistral", "llama3", "linear", "yarn"]
FORMATS_TAKEN_APART = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    struct.error,
    RecursionError,
    OverflowError,
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, overwrite, cut, insert, repeat or move bytes."""
    at = random.randrange(len(data) + 1)
    length = random.choice([1, 1, 2, 4, 8, 16, 64, 200])
    piece = data[at : at + length]
    choice = random.randrange(7)
    if choice == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if choice == 1:
        return data[:at] + bytes(random.randrange(256) for _ in range(length)) + data[at + length :]
    if choice == 2:
        return data[:at] + data[at + length :]
    if choice == 3:
        return data[:at] + random.choice([b"\0", b"\xff", b"[", b'{"', b"\n", b"\xc3\x28"]) * length + data[at:]
    if choice == 4:
        return data[:at] + piece * random.choice([2, 3, 50]) + data[at + length :]
    if choice == 5:
        to = random.randrange(len(data) + 1)
        return data[:to] + piece + data[to + length :]
    return data[:at] if random.randrange(2) else data[:at] + random.choice([b"\0", b"\xff"]) * length + data[at + length :]


def any_value(random: Random) -> Any:
    """A JSON value that readers may not expect."""
    choice = random.randrange(5)
    if choice < 2:
        return random.choice(NUMBERS)
    if choice == 2:
        return random.choice(TEXTS)
    simple: list[Any] = [None, True, False, [], {}, [[]], [0] * 9, [1, 1], {"": None}, {"a": [{}]}, ["a"]]
    return random.choice(simple)


def mutate_value(value: Any, random: Random) -> Any:
    """A copy of a JSON value with one place changed: replaced, removed, doubled, exchanged or put elsewhere."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return any_value(random)
    holder, key = random.choice(places)
    other, other_key = random.choice(places)
    choice = random.randrange(7)
    if choice < 3:
        holder[key] = any_value(random)
    elif choice == 3:
        if isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] += random.choice([-1, 1, 63, 64, 2**32])
        else:
            del holder[key]
    elif choice == 4:
        holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])
    elif choice == 5:
        holder[key] = copy.deepcopy(other[other_key])
    elif isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(holder[key])] * random.choice([1, 2, 70])
    else:
        name = random.choice([random.choice(TEXTS), f"{key}x", str(other_key)])
        holder[name] = copy.deepcopy(holder[key])
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def json_text(value: Any, random: Random) -> bytes:
    """The text of a JSON value, seldom in a form that is no JSON, says a thing twice or is nested without end."""
    text = compact(value)
    choice = random.randrange(24)
    if choice == 0:
        depth = random.choice([60, 70, 3000, 200_000])
        return text.replace(b"null", b"[" * depth + b"]" * depth, 1)
    if choice == 1:
        at = text.find(b'"', random.randrange(len(text) + 1))
        end = text.find(b",", at)
        return text[:end] + b"," + text[at:end] + text[end:] if 0 <= at < end else text
    if choice == 2:
        return text.replace(b"0", b"9" * random.choice([25, 5000]), 1)
    if choice == 3:
        return json.dumps(value, indent=1).encode()
    return text


def mutate_packed(data: bytes, random: Random) -> bytes:
    """Change the header or a section of a packed file; lengths and checksums are right again, most of the time."""
    try:
        parts = PackedParts.of(data)
        return _mutate_packed_parts(parts, random)
    except FORMATS_TAKEN_APART:
        return mutate_bytes(data, random)


def _mutate_packed_parts(parts: PackedParts, random: Random) -> bytes:
    choice = random.randrange(8)
    if choice < 3:
        placed = parts.to_bytes()
        parts.header = json_text(mutate_value(parts.header, random), random)
        return seal_packed(placed[: _header_offset(placed)], parts.header)
    if choice == 3:
        part = random.choice([key for key in ("config", "self_test", "provenance", "tensors") if parts.header.get(key)])
        parts.header[part] = mutate_value(parts.header[part], random)
    elif parts.sections:
        number, other = random.randrange(len(parts.sections)), random.randrange(len(parts.sections))
        if choice == 4:
            parts.sections[number], parts.sections[other] = parts.sections[other], parts.sections[number]
        else:
            parts.sections[number] = mutate_content(parts.sections[number], random)
    if random.randrange(8):
        parts.place()
    return parts.to_bytes()


def mutate_packed_content(data: bytes, random: Random) -> bytes:
    """Change what a packed file says of the model, while the file itself stays sound: for what comes after the reader."""
    if random.randrange(8) == 0:
        return mutate_packed(data, random)
    try:
        parts = PackedParts.of(data)
        files = sorted(parts.header["files"].values())
        choice = random.randrange(4)
        if choice < 2 or not parts.sections:
            part = ("config", "self_test")[choice]
            parts.header[part] = mutate_value(parts.header[part], random)
        else:
            number = random.choice(files) if choice == 2 and files else random.randrange(len(parts.sections))
            parts.sections[number] = mutate_content(parts.sections[number], random)
        parts.place()
        return parts.to_bytes()
    except FORMATS_TAKEN_APART:
        return mutate_bytes(data, random)


def _header_offset(data: bytes) -> int:
    return struct.unpack_from("<Q", data, 24)[0]  # type: ignore[no-any-return]


def mutate_content(content: bytes, random: Random) -> bytes:
    """A payload or side file; JSON as JSON."""
    if content[:1] == b"{" and random.randrange(4):
        try:
            return json_text(mutate_value(json.loads(content), random), random)
        except FORMATS_TAKEN_APART:
            pass
    if random.randrange(2) and content:
        # As long as it was: what the header says stays true.
        changed = mutate_bytes(content, random)
        return (changed + bytes(len(content)))[: len(content)]
    return mutate_bytes(content, random)


def mutate_folder(data: bytes, random: Random) -> bytes:
    """Change, exchange, add or remove a file of a folder."""
    members = split_members(data)
    if not members:
        return mutate_bytes(data, random)
    name, other = random.choice(list(members)), random.choice(list(members))
    choice = random.randrange(10)
    if choice == 0:
        members[name], members[other] = members[other], members[name]
    elif choice == 1:
        del members[name]
    elif choice == 2:
        members[random.choice(["model.safetensors", "config.json", "cluscomp.json", "tokenizer.json", f"{name}x"])] = members[
            name
        ]
    elif name.endswith(".safetensors"):
        members[name] = _mutate_safetensors(members[name], random)
    else:
        members[name] = mutate_content(members[name], random)
    return join_members(members)


def _mutate_safetensors(data: bytes, random: Random) -> bytes:
    try:
        header, content = split_safetensors(data)
        if random.randrange(3):
            return join_safetensors(json_text(mutate_value(header, random), random), content)
        return join_safetensors(header, mutate_content(content, random))
    except FORMATS_TAKEN_APART:
        return mutate_bytes(data, random)


def mutate_delta(data: bytes, random: Random) -> bytes:
    """Change header or data of a delta; the checksum is right, most of the time."""
    changed = _mutate_safetensors(data, random)
    return seal_delta(changed) if random.randrange(8) else changed


def mutate_gguf(data: bytes, random: Random) -> bytes:
    """Change a key, a value, a tensor or the data of a GGUF file; the checksums of a native one are right, most of the time."""
    try:
        parts = GgufParts.of(data)
        choice = random.randrange(8)
        if choice < 4 and parts.pairs:
            _mutate_pair(parts, random)
        elif choice < 6 and parts.tensors:
            _mutate_tensor(parts, random)
        elif choice == 6:
            number = random.choice([-1, 1, 2**32, 2**63])
            attribute = random.choice(["more_pairs", "more_tensors", "version"])
            setattr(parts, attribute, getattr(parts, attribute) + number)
        else:
            parts.data = mutate_content(parts.data, random)
        if random.randrange(4):
            parts.place()
        return parts.to_bytes()
    except FORMATS_TAKEN_APART:
        return mutate_bytes(data, random)


def _mutate_pair(parts: GgufParts, random: Random) -> None:
    number = random.randrange(len(parts.pairs))
    key, kind, value = parts.pairs[number]
    choice = random.randrange(6)
    if choice == 0:
        del parts.pairs[number]
    elif choice == 1:
        parts.pairs.insert(random.randrange(len(parts.pairs) + 1), (key, kind, value))
    elif choice == 2:
        parts.pairs[number] = (key, random.choice([*range(14), 2**32 - 1]), value)
    elif kind == 9:
        item, values = value
        changed = mutate_value([member for member in values if not isinstance(member, bytes)], random) if item != 8 else None
        if item == 8:
            changed = list(values)
            at = random.randrange(len(changed) + 1)
            changed[at : at + random.randrange(2)] = [_any_text(random)] * random.choice([1, 1, 2])
        parts.pairs[number] = (key, kind, (item, changed if isinstance(changed, list) else [changed]))
    elif kind == 8:
        parts.pairs[number] = (key, kind, mutate_content(value, random) if random.randrange(4) else _any_text(random))
    else:
        parts.pairs[number] = (key, random.choice([kind, kind, 10, 11, 12]), random.choice(NUMBERS))


def _any_text(random: Random) -> bytes:
    text = random.choice(TEXTS).encode("utf-8", "surrogatepass")
    return random.choice([text, text, text * 40, b"\xff\xfe", b"\xc3", b"a b"])


def _mutate_tensor(parts: GgufParts, random: Random) -> None:
    tensor, other = random.choice(parts.tensors), random.choice(parts.tensors)
    choice = random.randrange(6)
    if choice == 0 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice([n for n in NUMBERS if isinstance(n, int)])
    elif choice == 1:
        tensor.dims = random.choice([[], tensor.dims[::-1], [*tensor.dims, 1], [1] * 5, [0], list(other.dims)])
    elif choice == 2:
        tensor.type = random.choice([*range(42), 2**32 - 1])
    elif choice == 3:
        tensor.offset = random.choice([tensor.offset + 1, tensor.offset + 64, other.offset, 2**63, 2**64 - 64])
    elif choice == 4:
        tensor.name = random.choice([other.name, b"", b"\xff", _any_text(random), b"output.weight", b"rope_freqs.weight"])
    else:
        parts.tensors.insert(0, GgufTensor(tensor.name + b"x", list(tensor.dims), tensor.type, tensor.offset))
