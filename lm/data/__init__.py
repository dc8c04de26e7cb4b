"""Data: from sources of text to batches, a pure function of seed, step and data.

Read in the order of the data: `sources` (the interface of documents and records), `text/` (the
library's sources of documents), `records` (rows of a task, checked and renamed, and their files),
`chat/` (`messages`: rows as messages; `conversations`: those as records; chat templates),
`tokenizer` (the interface; `tokenizers/` has the library's) and `special_tokens` (ids around and in
place of a text's), `store` and `record_store` (tokens on disk; windows of them, rows of several
records), `batches` (rows of a step on the devices; `contiguous` orders them for models that carry
state, `mixture` mixes corpora). A large corpus, or one whose cache is in a bucket, is divided:
`sources.Part`, `sharded_store` (what is built), `shared_build` (by whom), `shared_folder` (where),
`shards` (a file, and arrays over all). `dataset` opens all of it from a configuration, `splits`
what evaluation needs.

Files are found and opened by `files` (`compression` by their endings, `remote` by URL). A source of
files reads through `files.open_file`, hashes with `file_digests.hash_files`, and so works with all.
"""
