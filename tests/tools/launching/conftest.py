"""What the tests of supervision share."""

from __future__ import annotations

import pytest

from lm.training.monitor import StopRequest


@pytest.fixture
def stop() -> StopRequest:
    """Nothing has asked to stop yet."""
    return StopRequest()
