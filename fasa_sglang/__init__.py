"""FASA for SGLang: decode long contexts by reading only the tokens that matter to the query."""

__version__ = "0.1.0"
