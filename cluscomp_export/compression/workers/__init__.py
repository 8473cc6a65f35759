"""Threads, processes and machines that fit codebooks and encode matrices."""
