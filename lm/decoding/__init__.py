"""Decoding: generate tokens and texts from prompts or sources with a trained model.

Read `prompts.py` (inputs), `controls.py` (constraints), then `sampling.py` and `beam.py` (token
selection), `batch.py` (many inputs on a mesh), `generation.py` (text to text) and
`generate_file.py` (files). `chats.py` has conversations as inputs, `chat_session.py` the state of
`lm chat`. Public: `generate_texts`, `stream_continuations`, `generate_file`.
"""
