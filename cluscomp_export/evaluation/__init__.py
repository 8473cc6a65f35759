"""How good a model is: perplexity, divergence, task scores."""
