"""Turns a language model into a ClusComp codebook model: sources, clustering, planning, conversion, validation."""

import cluscomp_kernels  # noqa: F401 - first: it sets how torch's threads wait, before torch is loaded
