"""Engine: continuous batching of requests over a paged key/value cache.

Requests enter and leave at every step. Read `requests.py`, then `engine.py`; `programs.py` has the
compiled steps, `pages.py` the pages that rows share.
"""
