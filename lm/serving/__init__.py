"""HTTP server with OpenAI's API over the engines (`lm serve`, extra `serve`).

Read `app.py`, then `completion_api.py`; `engine_thread.py` is between the event loop and an engine,
`served_models.py` loads runs and reloads newer checkpoints.
"""
