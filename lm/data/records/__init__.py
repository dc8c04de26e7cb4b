"""Records of a task, such as sentence pairs or questions.

Read `record_files` (rows of files), `records` (rows checked and renamed), `record_store` (tokens on
disk) and `record_packing` (several records in one row of a batch).
"""
