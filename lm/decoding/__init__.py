"""Decoding: from prompts or sources to new tokens and texts, with a trained model.

Read `prompts.py` (inputs), `controls.py` (constraints), then `sampling.py` and `beam.py`, the two
ways to choose tokens, `batch.py` (many inputs on a mesh), `generation.py` (text to text) and
`generate_file.py` (files). `chats.py` has conversations as inputs, `chat_session.py` that of
`lm chat`. Public: `generate_texts`, `stream_continuations`, `generate_file`.
"""
