"""Data: from sources of text to batches, a pure function of seed, step and data.

Read in the order of the data: `sources` (the interface of documents and records), `text/` and
`records/` (the library's sources), `tokenizers/`, `store` (tokens on disk, and windows of them),
`batches` (rows of a step on the devices; `contiguous` orders them for models that carry state).
`dataset` opens all of it from a configuration, `splits` what evaluation needs.
"""
