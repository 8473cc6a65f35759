"""Text to token ids and back, and token ids as callers pass them."""

from cluscomp_runtime.tokenizer.token_ids import token_batch, token_ids
from cluscomp_runtime.tokenizer.tokenizer import Tokenizer, end_tokens

__all__ = ["Tokenizer", "end_tokens", "token_batch", "token_ids"]
