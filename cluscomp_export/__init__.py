"""Turns a language model into a ClusComp codebook model: sources, clustering, planning, conversion, validation."""
