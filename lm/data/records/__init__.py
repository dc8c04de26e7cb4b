"""Records of a task, such as sentence pairs or questions.

Read `records` (rows checked and renamed, and the files that they come from), then `record_store`
(tokens on disk, and packing several records into one row of a batch).
"""
