"""Conversations: rows of files as messages, chat templates, and what is learnt of their tokens."""
