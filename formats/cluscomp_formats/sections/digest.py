"""The digest of a model in a file: computed while its payloads stream by, held against what the file says."""

from __future__ import annotations

from collections.abc import Iterator

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, DigestBuilder, Model
from cluscomp_formats.sections.header import PackedHeader
from cluscomp_formats.sections.mapped_file import MappedFile
from cluscomp_formats.sections.payloads import Payload, stored_payloads

__all__ = ["NO_DIGEST", "check_claim", "content_problems", "hash_payload"]

NO_DIGEST = "sha256:" + "0" * 64
"""Takes the room of a digest that is not known yet."""

_FETCH_AGAIN = "copy, download or convert it again"


def hash_payload(builder: DigestBuilder, payload: Payload, array: Array, values: AnyArray) -> None:
    """Add a payload to the digest; side files do not enter."""
    if payload.description is not None:
        builder.add(payload.description, array, values)


def check_claim(model: Model, digest: str, file: str | None = None) -> None:
    """Hold the computed digest of a model against the one it was read with. Raises InvalidFileError if they differ.

    Writers do so before their output appears: an artefact that is not what it says must not become one that is.
    """
    if model.claimed_digest not in (None, digest):
        message, remedy = "the content is not what the digest says", _FETCH_AGAIN
        raise InvalidFileError(Problem("digest_mismatch", message, file, None, digest, model.claimed_digest, remedy))


def content_problems(header: PackedHeader, model: Model, file: MappedFile) -> Iterator[Problem]:
    """What is wrong with the payloads, all of which are read, or with the digest over them."""
    builder = DigestBuilder(model.config)
    sound = True
    for payload, array in stored_payloads(model):
        try:
            values = array.read()
        except InvalidFileError as error:
            sound = False
            yield from error.problems
            continue
        if payload.description is not None:
            builder.add(payload.description, array, values)
    if sound and builder.digest() != header.digest:
        message = "the content is not what the digest says"
        yield Problem("digest_mismatch", message, file.name, "header", builder.digest(), header.digest, _FETCH_AGAIN)
