"""From a plan to codebooks and codes."""
