"""Tokenizers: `tokenizer` has the interface and opens one by name; a file for each kind."""
