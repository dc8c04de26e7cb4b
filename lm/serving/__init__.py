"""HTTP server with OpenAI's API on top of the engines (`lm serve`, extra `serve`).

Read `app.py`, then `completion_api.py`; `engine_thread.py` connects the event loop to an engine,
`served_models.py` loads runs and reloads newer checkpoints.
"""
