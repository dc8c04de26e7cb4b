"""Runs on disk: workdir, checkpoints, and parameters read from them.

Used by training, evaluation, decoding and interop, which all read or write runs. Public:
`checkpoints.prepare_workdir`, `checkpoints.Checkpoints`, `workdir.load_run_config`,
`saved_params.restore_run` and `saved_params.merge_run`.
"""
