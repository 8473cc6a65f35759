"""The digest of a model in a file: computed while its payloads are streamed, and compared with the recorded one."""

from __future__ import annotations

from collections.abc import Iterator

from cluscomp_formats.errors import InvalidFileError, Problem
from cluscomp_formats.ir import AnyArray, Array, DigestBuilder, Model
from cluscomp_formats.sections.header import PackedHeader
from cluscomp_formats.sections.mapped_file import MappedFile
from cluscomp_formats.sections.payloads import Payload, stored_payloads

__all__ = ["NO_DIGEST", "check_claim", "content_problems", "hash_payload"]

NO_DIGEST = "sha256:" + "0" * 64
"""Placeholder for a digest that has not been computed yet."""

_FETCH_AGAIN = "copy, download or convert it again"


def hash_payload(builder: DigestBuilder, payload: Payload, array: Array, values: AnyArray) -> None:
    """Add a payload to the digest; side files are not included."""
    if payload.description is not None:
        builder.add(payload.description, array, values)


def check_claim(model: Model, digest: str, file: str | None = None) -> None:
    """Compare the computed digest of a model with the one in its source. Raises InvalidFileError if they differ.

    Writers call this before they rename their output: otherwise a damaged model would get a valid digest.
    """
    if model.claimed_digest not in (None, digest):
        message, remedy = "the content does not match the digest", _FETCH_AGAIN
        raise InvalidFileError(Problem("digest_mismatch", message, file, None, digest, model.claimed_digest, remedy))


def content_problems(header: PackedHeader, model: Model, file: MappedFile) -> Iterator[Problem]:
    """Yield the problems of the payloads, all of which are read, and of the digest over them."""
    builder = DigestBuilder(model.config)
    valid = True
    for payload, array in stored_payloads(model):
        try:
            values = array.read()
        except InvalidFileError as error:
            valid = False
            yield from error.problems
            continue
        if payload.description is not None:
            builder.add(payload.description, array, values)
    if valid and builder.digest() != header.digest:
        message = "the content does not match the digest"
        yield Problem("digest_mismatch", message, file.name, "header", builder.digest(), header.digest, _FETCH_AGAIN)
