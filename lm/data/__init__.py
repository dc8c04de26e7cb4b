"""Data: from text sources to batches, as a pure function of seed, step and data.

Read in the order of the data: `sources` (the interface for documents and records), `text/`
(document sources of the library), `records` (rows of a task, checked and renamed, and their files),
`chat/` (`messages`: rows as messages; `conversations`: records of those; chat templates),
`tokenizer` (the interface; `tokenizers/` has the library's) and `special_tokens`, `store` and
`record_store` (tokens on disk; windows, packed records), `batches` (rows of a step on the devices;
`contiguous` orders them for models with carried state, `mixture` mixes corpora). A large corpus, or
one whose cache is in a bucket, is sharded: `sources.Part`, `sharded_store` (what is built),
`shared_build` (by whom), `shared_folder` (where), `shards` (file format, and arrays over all
shards). `dataset` opens everything for a configuration, `splits` what evaluation needs.

Files are found and opened by `files` (`compression` by suffix, `remote` by URL). A file source
reads with `files.open_file` and hashes with `file_digests.hash_files`, and so supports all of them.
"""
