"""Looking inside a model: attention, residual stream, logit lens, attribution, neurons, probes.

Read `capture.py`, then `reading.py`; `lm/tools/reports/inspect_page.py` makes the page of them.
"""
