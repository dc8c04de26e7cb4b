"""Runs on disk: workdir, checkpoints, and the parameters read from them.

Below training, evaluation, decoding and interop, which all read or write runs. Public:
`checkpoints.prepare_workdir`, `checkpoints.Checkpoints`, `workdir.load_run_config`,
`saved_params.restore_run` and `saved_params.merge_run`.
"""
