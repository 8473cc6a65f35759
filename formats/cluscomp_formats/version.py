"""The one version of the distribution; every package reports it."""

__version__ = "0.1.0"
