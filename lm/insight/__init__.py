"""Interpretability: attention, residual stream, logit lens, attribution, neurons, probes.

Read `capture.py`, then `reading.py`; `lm/tools/reports/inspect_page.py` renders the page.
"""
