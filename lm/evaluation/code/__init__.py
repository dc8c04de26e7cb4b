"""Code: programs that a model writes, run in a sandbox against the tests of a problem (pass@k).

Read `problems` (files), `completions` (what a model writes), `pass_rates` (scores), `sandbox`.
"""
