"""Generated text and its JSON record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Generation:
    """Generated text.

    Attributes:
        text: the text; "" if withheld by a guard.
        score: its score; None if it was sampled.
        withheld: whether a guard withholds it.
    """

    text: str
    score: float | None
    withheld: bool = False

    def without_text(self) -> Generation:
        """Return a copy without the text, marked as withheld."""
        return replace(self, text="", withheld=True)

    def record(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"text": self.text, "score": self.score} | (
            {"withheld": True} if self.withheld else {}
        )


def generation_record(
    role: str, text: Any, generations: Sequence[Generation], n_best: int
) -> dict[str, Any]:
    """Format the generations of an input as a JSON object.

    Args:
        role: name of the input: "source", "prompt" or "messages".
        text: input, a JSON value.
        generations: generated texts, best first.
        n_best: number of them to list under "hypotheses"; 1: no list.
    """
    if not generations:
        found: dict[str, Any] = {role: text, "text": ""}
    else:
        found = {role: text, **generations[0].record()}
        if found["score"] is None:
            del found["score"]
    if n_best > 1:
        found["hypotheses"] = [generation.record() for generation in generations[:n_best]]
    return found
