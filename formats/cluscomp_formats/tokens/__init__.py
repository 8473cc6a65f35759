"""The tokens of a model according to its side files, in the same way for every container format; see `docs/tokens.md`."""

from cluscomp_formats.tokens.added_tokens import AddedToken, special_tokens
from cluscomp_formats.tokens.end_tokens import end_tokens
from cluscomp_formats.tokens.json_files import read_json_file
from cluscomp_formats.tokens.tokenizer_files import TOKEN_FILES, TokenizerFiles, no_tokenizer, read_tokenizer, with_tokenizer
from cluscomp_formats.tokens.unsupported import UnsupportedTokenizer

__all__ = [
    "TOKEN_FILES",
    "AddedToken",
    "TokenizerFiles",
    "UnsupportedTokenizer",
    "end_tokens",
    "no_tokenizer",
    "read_json_file",
    "read_tokenizer",
    "special_tokens",
    "with_tokenizer",
]
