"""How long jobs report progress; see `cluscomp_formats.progress`."""

from cluscomp_formats.progress import Progress, silent

__all__ = ["Progress", "silent"]
