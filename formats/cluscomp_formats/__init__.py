"""The intermediate representation of a codebook model and the file formats that hold it. Needs numpy only."""

from cluscomp_formats.version import __version__

__all__ = ["__version__"]
