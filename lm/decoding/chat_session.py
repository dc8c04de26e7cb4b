"""Conversation with a model: its messages, and the answers as they grow."""

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
    """Conversation with a model; it changes as it goes on.

    Attributes:
        experiment: experiment on a mesh, prepared for decoding.
        params: its parameters.
        template: chat template.
        sampling: options of sampling.
        seed: seed of the first answer; each takes the next one.
        stop: texts before the first of which an answer ends.
        system: system prompt; "": none.
        messages: what was said, without the system prompt.
        tools: JSON schemas of the tools that may be called; None: none.
        n_forgotten: oldest turns that no longer fit the context.
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
        """Say something, and yield the parts of the answer; an error leaves nothing said."""
        self.messages.append({"role": "user", "content": text})
        try:
            self.n_forgotten = self._first_turn()
        except UserError:
            self.messages.pop()
            raise
        return self._answer()

    def answer_again(self) -> Generator[str]:
        """Drop the last answer, and yield the parts of another one.

        Raises:
            UserError: nothing was asked.
        """
        starts = self._starts()
        if not starts:
            raise UserError("nothing to answer yet")
        del self.messages[starts[-1] + 1 :]
        self.n_forgotten = self._first_turn()
        return self._answer()

    def take_back(self) -> None:
        """Drop the last turn: what was said and the answer.

        Raises:
            UserError: there is none.
        """
        starts = self._starts()
        if not starts:
            raise UserError("nothing to undo")
        del self.messages[starts[-1] :]
        self.n_forgotten = 0

    def restart(self) -> None:
        """Forget all that was said; the system prompt and the tools stay."""
        self.messages.clear()
        self.n_forgotten = 0

    def save(self, file: Path) -> None:
        """Write the conversation as a row of chat data, which `load` and objectives read.

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
        """Take the first conversation of a .jsonl file, and return how many it has.

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
        """Return the indices of the messages that start turns: those of the user."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def _shown(self, first: int) -> Chat:
        """Return what the model reads if it forgets the turns before one."""
        start = self._starts()[first] if first else 0
        return Chat([*system_message(self.system), *self.messages[start:]], self.tools)

    def _first_turn(self) -> int:
        """Return the number of oldest turns to forget, so that an answer fits the context.

        Raises:
            UserError: what was said last does not fit alone.
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
        """Yield the parts of an answer, which is kept as far as it was written."""
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
