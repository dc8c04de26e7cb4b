"""Fixtures for the launching tests."""

from __future__ import annotations

import pytest

from lm.training.monitor import StopRequest


@pytest.fixture
def stop() -> StopRequest:
    """Return a request to stop that has not been made."""
    return StopRequest()
