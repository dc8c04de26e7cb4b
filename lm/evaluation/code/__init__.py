"""Code generation: run generated programs in a sandbox against the tests of a problem (pass@k).

Read `problems` (files), `completions` (generation), `pass_rates` (scores), `sandbox`.
"""
