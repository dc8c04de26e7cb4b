"""Work queue: limit on the work that a model accepts."""

from __future__ import annotations

from lm.serving.request_body import ApiError


class WorkQueue:
    """Counter of accepted work: replies, and groups of texts that are processed together.

    Attributes:
        size: maximum amount.
        n: current amount.
    """

    def __init__(self, size: int):
        self.size, self.n = size, 0

    def take(self, n: int) -> None:
        """Add the work of a request.

        Raises:
            ApiError: the queue is full, or smaller than this work.
        """
        if n > self.size:
            raise ApiError(400, f"{n} replies or groups of texts: the queue holds {self.size}")
        if self.n + n > self.size:
            raise ApiError(429, "too many waiting requests; try again later", code="queue_full")
        self.n += n

    def give_back(self, n: int) -> None:
        """Subtract finished work."""
        self.n -= n
