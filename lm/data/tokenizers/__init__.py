"""Tokenizers, one file per kind; `lm/data/tokenizer.py` has the interface."""
