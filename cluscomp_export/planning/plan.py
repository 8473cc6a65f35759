"""A plan: which tensors are clustered, with which codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluscomp_export.planning.candidates import CODEBOOK_DTYPES, ROUNDING_ERROR, expected_error, mixing, num_vectors

__all__ = ["CodebookPlan", "Plan", "Share", "TensorScheme"]

Share = Literal["none", "kind", "model"]


@dataclass(frozen=True)
class CodebookPlan:
    """A codebook to make: `num_clusters` centroids of `cluster_dim` for the tensors named in `members`.

    `value_bits` is a key of `CODEBOOK_DTYPES`.
    """

    name: str
    cluster_dim: int
    num_clusters: int
    members: tuple[str, ...]
    value_bits: int

    @property
    def dtype(self) -> str:
        return CODEBOOK_DTYPES[self.value_bits]

    @property
    def shared(self) -> bool:
        """Whether several tensors use it. Their rows are then scaled to unit variance."""
        return len(self.members) > 1


@dataclass(frozen=True)
class TensorScheme:
    """How one clustered tensor is stored. `shape` is `(out_features, in_features)`."""

    shape: tuple[int, int]
    codebook: CodebookPlan
    row_scale: bool


@dataclass(frozen=True)
class Plan:
    """Treatments of the tensors to be clustered; every other tensor stays dense."""

    schemes: Mapping[str, TensorScheme]

    def expected_error(self, name: str, *, feedback: bool = False) -> float:
        """Expected squared error of a clustered tensor, relative to its squared weights; see `candidates.expected_error`."""
        book = self.schemes[name].codebook
        vectors = sum(num_vectors(self.schemes[member].shape, book.cluster_dim) for member in book.members)
        clustering = expected_error(book.cluster_dim, book.num_clusters, vectors, feedback=feedback)
        return mixing(book.members) * clustering + ROUNDING_ERROR[book.value_bits]

    @property
    def codebooks(self) -> tuple[CodebookPlan, ...]:
        """Every codebook once, in order of first use."""
        return tuple({scheme.codebook.name: scheme.codebook for scheme in self.schemes.values()}.values())
