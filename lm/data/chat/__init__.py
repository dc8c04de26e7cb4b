"""Conversations: rows as messages, chat templates, and which tokens are training targets."""
