"""Recordings of speech: reading them, their features, and sources of transcribed ones."""
