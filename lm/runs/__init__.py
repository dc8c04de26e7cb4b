"""Runs on disk: workdir, checkpoints, and the parameters read from them.

Below training, evaluation, decoding and interop, which all read or write runs. Public:
`saved_params.load_run`, `checkpoints.Checkpoints`, `workdir.load_config`, `merged_run.merge_run`.
"""
