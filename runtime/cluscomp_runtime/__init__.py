"""The minimal runtime: load a codebook model and run it. Needs numpy, torch and tokenizers."""
