"""The digest: a value assembled by hand from its definition, and the parts of a model that it does and does not cover."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from cluscomp_formats.ir import Array, ClusteredWeight, Codebook, DenseTensor, Model, Outliers, Stage

CODEBOOK = Codebook("shared", Array.of(np.array([[1, 2], [3, 4]], dtype=np.float16)))
CODES = np.array([[0, 1], [1, 0]], dtype=np.uint16)


def weight(name: str, **changes: Any) -> ClusteredWeight:
    return ClusteredWeight(name, (3, 2), (Stage(CODEBOOK, Array.of(CODES)),), **changes)


def model(**changes: Any) -> Model:
    outliers = Outliers(Array.of(np.array([5], dtype=np.uint32)), Array.of(np.array([0.5], dtype=np.float32)))
    tensors = {
        "b.weight": weight("b.weight"),
        "a.weight": weight("a.weight", row_scale=Array.of(np.array([1, 2, 3], dtype=np.float16)), outliers=outliers),
        "Z.bias": DenseTensor("Z.bias", Array.of(np.array([7], dtype=np.uint16), "bfloat16")),
    }
    return replace(Model({"hidden_size": 2, "eps": 1e-05}, tensors), **changes)


def test_known_answer() -> None:
    # Written byte by byte: upper case sorts before lower case; the shared codebook occurs once, before its first user.
    axis = b'"tensor":"%s","weight_shape":[3,2]}\n'
    parts = [
        b'cluscomp-digest-1\n{"eps":1e-05,"hidden_size":2}\n',
        b'{"dtype":"bfloat16","part":"values","shape":[1],"tensor":"Z.bias"}\n\x07\x00',
        b'{"codebook":"shared","dtype":"float16","shape":[2,2]}\n\x00\x3c\x00\x40\x00\x42\x00\x44',
        b'{"codebook":"shared","dtype":"uint16","group_axis":"out","part":"codes","shape":[2,2],' + axis % b"a.weight",
        b"\0\0\1\0\1\0\0\0",
        b'{"dtype":"float16","part":"row_scale","shape":[3],"tensor":"a.weight"}\n\x00\x3c\x00\x40\x00\x42',
        b'{"dtype":"uint32","part":"outlier_positions","shape":[1],"tensor":"a.weight"}\n\x05\0\0\0',
        b'{"dtype":"float32","part":"outlier_values","shape":[1],"tensor":"a.weight"}\n\0\0\0\x3f',
        b'{"codebook":"shared","dtype":"uint16","group_axis":"out","part":"codes","shape":[2,2],' + axis % b"b.weight",
        b"\0\0\1\0\1\0\0\0",
    ]
    assert model().digest() == "sha256:" + hashlib.sha256(b"".join(parts)).hexdigest()


def test_files_provenance_and_self_test_do_not_enter() -> None:
    files = {"tokenizer.json": Array.of(np.frombuffer(b"{}", dtype=np.uint8))}
    assert model(files=files, provenance={"seed": 1}, self_test={"version": 1}).digest() == model().digest()


def test_order_of_tensors_does_not_enter() -> None:
    tensors = model().tensors
    assert model(tensors=dict(reversed(tensors.items()))).digest() == model().digest()


def test_everything_else_enters() -> None:
    tensors = model().tensors
    scale = Array.of(np.array([1, 2], dtype=np.float16))
    bias = Array.of(np.array([7], dtype=np.uint16))
    variants = [
        model(),
        model(config={"hidden_size": 2, "eps": 1e-06}),
        model(tensors={**tensors, "b.weight": weight("b.weight", column_scale=scale)}),
        model(tensors={**tensors, "Z.bias": DenseTensor("Z.bias", bias)}),
        model(tensors={**tensors, "Z.bias": DenseTensor("Z.bias", Array.of(np.array([[7]], dtype=np.uint16), "bfloat16"))}),
        model(tensors={**tensors, "Z.bias": DenseTensor("Z.bias", Array.of(np.array([8], dtype=np.uint16), "bfloat16"))}),
        model(tensors={name: tensor for name, tensor in tensors.items() if name != "b.weight"}),
        model(tensors={**tensors, "c.weight": weight("c.weight")}),
        model(tensors={**tensors, "b.weight": replace(weight("b.weight"), shape=(4, 2))}),
    ]
    digests = [variant.digest() for variant in variants]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == len("sha256:") + 64 for digest in digests)


def test_a_codebook_shared_or_repeated_is_listed_once() -> None:
    descriptions = [description for description, _ in model().payloads()]
    assert sum("part" not in description for description in descriptions) == 1
    assert list(model().codebooks) == ["shared"]
    assert set(model().clustered) == {"a.weight", "b.weight"}


def test_empty_model_and_empty_tensors_have_digests() -> None:
    empty = DenseTensor("e", Array.of(np.zeros((0, 3), dtype=np.float32)))
    assert Model({}, {}).digest() == "sha256:" + hashlib.sha256(b"cluscomp-digest-1\n{}\n").hexdigest()
    head = b'{"dtype":"float32","part":"values","shape":[0,3],"tensor":"e"}\n'
    assert Model({}, {"e": empty}).digest() == "sha256:" + hashlib.sha256(b"cluscomp-digest-1\n{}\n" + head).hexdigest()
