"""Deltas: the parameters of a clustered model that training changed, without codes; specified in `docs/delta-format.md`."""

from cluscomp_formats.delta.delta import Delta, changes, combine
from cluscomp_formats.delta.reader import is_delta, open_delta
from cluscomp_formats.delta.writer import write_delta

__all__ = ["Delta", "changes", "combine", "is_delta", "open_delta", "write_delta"]
