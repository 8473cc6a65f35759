"""Changes to ONNX folders: to the metadata as JSON, to any message of the graph, to the data and to the bytes on the wire."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

import onnx
from fuzzing.containers import compact, join_members, split_members
from fuzzing.mutations import FORMATS_TAKEN_APART, NUMBERS, TEXTS, json_text, mutate_bytes, mutate_content, mutate_value
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import helper

MODEL, DATA = "onnx/model.onnx", "onnx/model.onnx_data"
_PREFIX = "cluscomp."
_NAMES = [MODEL, DATA, "onnx", "onnx/x", "config.json", "model.onnx", "notes.txt/x"]
_WORDS = [
    *TEXTS,
    "ai.cluscomp",
    "ClusLinear",
    "ClusEmbedding",
    "Identity",
    "group_axis",
    "model.onnx_data",
    "../onnx/model.onnx_data",
]


def mutate_onnx(data: bytes, random: Random) -> bytes:
    """Change a file of the folder, mostly the graph or what it says of the data; the checksums are right, most of the time."""
    members = split_members(data)
    if not members:
        return mutate_bytes(data, random)
    name, other = random.choice(list(members)), random.choice(list(members))
    choice = random.randrange(12)
    if choice == 0:
        members[name], members[other] = members[other], members[name]
    elif choice == 1:
        members[random.choice([*_NAMES, f"{name}x"])] = members.pop(name)
    elif choice == 2 or MODEL not in members:
        members[name] = mutate_content(members[name], random)
    elif choice == 3:
        members[MODEL] = _mutate_wire(members[MODEL], random)
    else:
        try:
            proto = onnx.ModelProto.FromString(members[MODEL])
            members[DATA] = _mutate_parts(proto, members.get(DATA, b""), random)
            members[MODEL] = proto.SerializeToString(deterministic=True)
        except (*FORMATS_TAKEN_APART, DecodeError):
            members[MODEL] = _mutate_wire(members[MODEL], random)
    return join_members(members)


def _mutate_parts(proto: onnx.ModelProto, data: bytes, random: Random) -> bytes:
    choice = random.randrange(8)
    if choice < 3:
        _mutate_metadata(proto, random)
    elif choice < 6:
        mutate_message(proto, random)
    elif choice == 6:
        _nest(proto, random)
    else:
        data = mutate_content(data, random)
    if random.randrange(4):
        _place(proto, data)
    return data


def _mutate_metadata(proto: onnx.ModelProto, random: Random) -> None:
    entry = random.choice(proto.metadata_props)
    value = json.loads(entry.value)
    entry.value = json_text(mutate_value(value, random), random).decode("ascii")


def _place(proto: onnx.ModelProto, data: bytes) -> None:
    """Make the checksums true."""
    entries = {entry.key: entry for entry in proto.metadata_props}
    places = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in proto.graph.initializer}
    sums = []
    for name in json.loads(entries[f"{_PREFIX}sections"].value):
        begin, length = (int(places[name][key]) for key in ("offset", "length"))
        sums.append(zlib.crc32(data[begin : begin + length]))
    entries[f"{_PREFIX}crc32"].value = compact(sums).decode()


def mutate_message(proto: Message, random: Random) -> None:
    """Change a field of a message or of one inside it: set, clear, repeat, remove, exchange or copy from elsewhere."""
    message = _somewhere(proto, random)
    field = random.choice(message.DESCRIPTOR.fields)
    present = [field for field, _ in message.ListFields()]
    if present and random.randrange(4):
        field = random.choice(present)
    if field.is_repeated:
        _mutate_items(getattr(message, field.name), field, random)
    elif random.randrange(6) == 0:
        message.ClearField(field.name)
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
        mutate_message(getattr(message, field.name), random)
    else:
        setattr(message, field.name, _scalar(field, proto, random))


def _somewhere(message: Message, random: Random) -> Message:
    """The message itself or one inside it; each level is as likely as the next, whatever it holds."""
    while random.randrange(4):
        inside = [(field, value) for field, value in message.ListFields() if field.message_type is not None]
        if not inside:
            break
        field, value = random.choice(inside)
        message = random.choice(value) if field.is_repeated else value
    return message


def _mutate_items(items: Any, field: FieldDescriptor, random: Random) -> None:
    choice = random.randrange(5)
    place, other = (random.randrange(len(items)) if items else 0 for _ in range(2))
    values = list(items)
    if choice == 0 and values:
        del items[place]
    elif choice == 1 and values:
        values[place], values[other] = values[other], values[place]
        del items[:]
        items.extend(values)
    elif choice == 2 and values:
        items.extend([values[place]] * random.choice([1, 1, 70]))
    elif field.message_type is not None:
        if values and random.randrange(2):
            items[place].CopyFrom(values[other])
        else:
            for _ in range(random.choice([1, 1, 2000])):
                items.add()
    else:
        value = _scalar(field, items, random)
        if values and random.randrange(2):
            items[place] = value
        else:
            items.extend([value] * random.choice([1, 1, 2000]))


def _scalar(field: FieldDescriptor, around: Any, random: Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        names = list(_texts(around, 3)) if isinstance(around, Message) else [item for item in around if isinstance(item, str)]
        text = random.choice([*_WORDS, *names, *names[:20]])
        return text.encode("utf-8", "replace").decode()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return random.choice([b"", b"\0", b"a" * 300, b"\xff"])
    if field.type == FieldDescriptor.TYPE_ENUM:
        return random.choice(field.enum_type.values).number
    number = random.choice(NUMBERS)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return min(float(number), 1e38) if number == number else number  # noqa: PLR0124
    bits = 32 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    unsigned = field.cpp_type in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
    whole = int(number) if abs(number) < 2**70 else 0
    return whole % 2**bits if unsigned else (whole + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def _texts(message: Message, depth: int) -> Iterator[str]:
    """Names in a message and those in it, to put in other places."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            yield from (text for text in (value if field.is_repeated else [value]) if isinstance(text, str) and len(text) < 200)
        elif field.message_type is not None and depth:
            for inner in list(value)[:200] if field.is_repeated else [value]:
                yield from _texts(inner, depth - 1)


def _nest(proto: onnx.ModelProto, random: Random) -> None:
    """Graphs in nodes in graphs, the innermost of which uses or hides an array."""
    names = [tensor.name for tensor in proto.graph.initializer if isinstance(tensor.name, str)] or ["x"]
    name = random.choice(names)
    node = helper.make_node("Identity", [name], [random.choice(["inner", name])])
    if proto.graph.node and random.randrange(2):
        node = random.choice(proto.graph.node)
    graph = helper.make_graph([node], "g", [], [])
    if random.randrange(3) == 0:
        graph.initializer.add(name=name, data_type=1, dims=[1], float_data=[1.0])
    for _ in range(random.choice([0, 1, 14, 16, 17, 40, 60])):
        graph = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=graph)], "g", [], [])
    attributes = {"then_branch": graph, "else_branch": graph} if random.randrange(2) else {"body": [graph, graph]}
    proto.graph.node.append(helper.make_node(random.choice(["If", "Scan"]), ["c"], ["y"], **attributes))


def _mutate_wire(data: bytes, random: Random) -> bytes:
    """Bytes of the protobuf: texts that are no UTF-8, lengths that lie, messages without end or by the thousand."""
    choice = random.randrange(6)
    at = random.randrange(len(data) + 1)
    if choice == 0 and at < len(data):
        return data[:at] + bytes([data[at] | 0x80]) + data[at + 1 :]
    # What is appended is merged.
    if choice == 1:
        many = random.choice([*(wire_field(number, b"") for number in (1, 5, 7, 14, 25)), b"\xff" * 9]) * random.choice(
            [1, 3000]
        )
        for number in random.choice([[], [7], [1, 7], [5, 7], [5, 1, 7]]):
            many = wire_field(number, many)
        return data + many
    if choice == 2:
        nested = b""
        for _ in range(random.choice([5, 20, 90, 120, 1000])):
            # A graph in an attribute of a node.
            nested = wire_field(1, wire_field(5, wire_field(6, nested)))
        return data + wire_field(7, nested)
    return mutate_bytes(data, random)


def wire_field(number: int, content: bytes) -> bytes:
    """A field of bytes or of another message, as protobuf writes it."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])
