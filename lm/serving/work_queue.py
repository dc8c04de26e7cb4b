"""Bound on the work that a model has taken."""

from __future__ import annotations

from lm.serving.request_body import ApiError


class WorkQueue:
    """Replies, and groups of texts that are read together, that wait or are worked on.

    Attributes:
        size: most of them.
        n: their number.
    """

    def __init__(self, size: int):
        self.size, self.n = size, 0

    def take(self, n: int) -> None:
        """Count the work of a request.

        Raises:
            ApiError: there is too much of it, now or at any time.
        """
        if n > self.size:
            raise ApiError(400, f"{n} replies or groups of texts: the queue holds {self.size}")
        if self.n + n > self.size:
            raise ApiError(429, "too many requests wait; try again later", code="queue_full")
        self.n += n

    def give_back(self, n: int) -> None:
        """Discount work that has ended."""
        self.n -= n
