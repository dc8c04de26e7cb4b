"""Best of n: rank several samples of each prompt by a reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from lm.data.chat.messages import content_text
from lm.decoding.chats import Chat
from lm.decoding.generated import Generation
from lm.runs.reward_model import RewardModel


def open_best_of(n: int, workdir: str) -> BestOf:
    """Open best-of-n selection with the reward model of a run; UserError if it is not one."""
    return BestOf(n, RewardModel(workdir))


@dataclass(frozen=True)
class BestOf:
    """Selection among samples.

    Attributes:
        n: samples per prompt.
        reward: reward model.
    """

    n: int
    reward: RewardModel

    def ordered(
        self,
        texts: Sequence[str] | Sequence[Chat],
        start: int,
        sample: Callable[[Sequence[Any], int], Iterator[list[Generation]]],
        progress: Callable[[int], Any],
    ) -> Iterator[list[Generation]]:
        """Yield the samples of each prompt, best first, with rewards as scores.

        Withheld samples come last.

        Args:
            texts: prompts, or conversations.
            start: index of the first prompt to process.
            sample: returns one sample for each of some prompts, starting at an index.
            progress: called with 1 for each finished prompt.
        """
        samples = sample([text for text in texts for _ in range(self.n)], start * self.n)
        for text in texts[start:]:
            found = [one for one, *_ in islice(samples, self.n)]
            rewards = self.reward.scores([_pair(text, one.text) for one in found]).tolist()
            progress(1)
            scored = [replace(one, score=r) for one, r in zip(found, rewards, strict=True)]
            yield sorted(scored, key=lambda one: (one.withheld, -(one.score or 0.0)))


def _pair(text: str | Chat, answer: str) -> tuple[Any, Any]:
    """Return the reward model's input for an answer: two texts, or two lists of messages."""
    if not isinstance(text, Chat):
        return text, answer
    given, last = list(text.messages), text.messages[-1]
    if last["role"] == "assistant":
        given.pop()
        answer = content_text(last["content"]) + answer
    return given, [{"role": "assistant", "content": answer}]
