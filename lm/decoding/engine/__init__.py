"""Engine: continuous batching over a paged key/value cache.

Requests join and leave at every step. Read `requests.py`, then `engine.py`; `programs.py` has the
compiled steps, `pages.py` the page pool.
"""
