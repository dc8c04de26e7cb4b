"""Runs on disk: workdir, checkpoints, and the parameters read from them.

Below training, evaluation, decoding and interop, which all read or write runs. Public:
`saved_params.restore_run`, `checkpoints.Checkpoints`, `workdir.load_run_config` and
`merged_run.merge_run`.
"""
