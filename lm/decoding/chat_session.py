"""Interactive conversation with a model: its messages, and streamed answers."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.data.chat.chat_template import ChatTemplate
from lm.data.chat.messages import Message
from lm.decoding.chats import Chat, chat_ids, system_message
from lm.decoding.generate_file import read_chats
from lm.decoding.generation import stream_continuations
from lm.decoding.sampling import Sampling
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import Params
from lm.storage import write_atomically


@dataclass
class ChatSession:
    """Mutable conversation with a model.

    Attributes:
        experiment: experiment on a mesh, prepared for decoding.
        params: parameters.
        template: chat template.
        sampling: sampling options.
        seed: seed of the first answer, incremented for each answer.
        stop: texts at which an answer is cut off.
        system: system prompt; "": none.
        messages: messages so far, without the system prompt.
        tools: JSON schemas of available tools, or None.
        n_forgotten: number of oldest turns that no longer fit the context.
    """

    experiment: Experiment
    params: Params
    template: ChatTemplate
    sampling: Sampling
    seed: int = 0
    stop: Sequence[str] = ()
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    tools: Sequence[Any] | None = None
    n_forgotten: int = 0

    def say(self, text: str) -> Generator[str]:
        """Send a user message, and yield the parts of the answer; undone on errors."""
        self.messages.append({"role": "user", "content": text})
        try:
            self.n_forgotten = self._first_turn()
        except UserError:
            self.messages.pop()
            raise
        return self._answer()

    def answer_again(self) -> Generator[str]:
        """Drop the last answer, and yield the parts of a new one.

        Raises:
            UserError: no question was asked.
        """
        starts = self._starts()
        if not starts:
            raise UserError("there is no question to answer yet")
        del self.messages[starts[-1] + 1 :]
        self.n_forgotten = self._first_turn()
        return self._answer()

    def take_back(self) -> None:
        """Drop the last turn: the user message and its answer.

        Raises:
            UserError: there is none.
        """
        starts = self._starts()
        if not starts:
            raise UserError("nothing to undo")
        del self.messages[starts[-1] :]
        self.n_forgotten = 0

    def restart(self) -> None:
        """Forget all messages; system prompt and tools stay."""
        self.messages.clear()
        self.n_forgotten = 0

    def save(self, file: Path) -> None:
        """Write the conversation as a row of chat data, readable by `load` and for training.

        Raises:
            UserError: the file cannot be written.
        """
        row: dict[str, Any] = {"messages": [*system_message(self.system), *self.messages]}
        row |= {"tools": self.tools} if self.tools else {}
        try:
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            write_atomically(file, json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error

    def load(self, file: Path) -> int:
        """Load the first conversation of a .jsonl file; return the number of conversations in it.

        Raises:
            UserError: there is none.
        """
        chats = read_chats(file)
        if not chats:
            raise UserError(f"{file}: no conversation")
        messages = list(chats[0].messages)
        has_system = messages[0]["role"] in ("system", "developer")
        self.system = str(messages.pop(0)["content"]) if has_system else ""
        self.messages, self.tools, self.n_forgotten = messages, chats[0].tools, 0
        return len(chats)

    def _starts(self) -> list[int]:
        """Return the indices of user messages, which start turns."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def _shown(self, first: int) -> Chat:
        """Return the conversation from a turn on, as the model reads it."""
        start = self._starts()[first] if first else 0
        return Chat([*system_message(self.system), *self.messages[start:]], self.tools)

    def _first_turn(self) -> int:
        """Return how many of the oldest turns to drop so that an answer fits the context.

        Raises:
            UserError: the last message does not fit on its own.
        """
        config = self.experiment.config
        context = config.model.max_length or config.data.sequence_length
        room = context - min(config.decode.max_length, context // 2)
        n_turns = len(self._starts())
        for first in range(self.n_forgotten, n_turns):
            length = len(chat_ids(self.template, self._shown(first)))
            if length <= room:
                return first
        if length < context:
            return n_turns - 1
        raise UserError(f"the message has {length} tokens; the context holds {context}")

    def _answer(self) -> Generator[str]:
        """Yield the parts of an answer, which is kept as far as it was generated."""
        seed, answer, is_kept = self.seed, "", True
        self.seed += 1
        try:
            for (part,) in stream_continuations(
                self.experiment,
                self.params,
                self.template.tokenizer,
                [self._shown(self.n_forgotten)],
                self.sampling,
                seed,
                self.stop,
                self.template,
            ):
                answer += part
                yield part
        except UserError:
            is_kept = False
            self.messages.pop()
            raise
        finally:
            if is_kept:
                self.messages.append({"role": "assistant", "content": answer})
