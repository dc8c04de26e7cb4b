"""Terminal of `lm chat`: reads messages and commands, and streams answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lm.errors import UserError

if TYPE_CHECKING:
    from lm.decoding.chat_session import ChatSession

_QUOTES, _NOTHING = '"""', '""'
# A model's output could contain terminal control characters.
_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {*map(ord, "\t\n")}, "\ufffd")


class _Left(Exception):
    """End of the conversation."""


class Terminal:
    """Loop over messages and commands.

    Args:
        session: the conversation.
        interactive: input comes from a person: show prompts, and continue after errors.
        output: stream for answers.
    """

    def __init__(self, session: ChatSession, interactive: bool, output: TextIO):
        self._session, self._interactive, self._output = session, interactive, output
        self._n_forgotten = 0

    def run(self) -> None:
        """Read until the end of the input or /exit.

        Raises:
            UserError: a message or command failed, if not interactive.
        """
        if self._interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  gives `input` editing and a history
            self._tell("/help lists commands; Ctrl-C ends an answer, Ctrl-D the conversation")
        while True:
            try:
                text = self._read()
                if text.startswith(_QUOTES):
                    self._say(text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n"))
                elif text.startswith("/"):
                    self._obey(text)
                else:
                    self._say(text)
            except (EOFError, _Left):
                if self._interactive:
                    print(file=self._output)
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print(file=self._output)
            except UserError as error:
                if not self._interactive:
                    raise
                self._tell(f"error: {error}")

    def _read(self) -> str:
        """Read a line, or all lines between triple quotes."""
        prompt, more = (">>> ", "... ") if self._interactive else ("", "")
        text = input(prompt)
        while text.startswith(_QUOTES) and not text.removeprefix(_QUOTES).endswith(_QUOTES):
            text += "\n" + input(more)
        if text.encode(errors="ignore").decode() != text:
            raise UserError("input must be UTF-8")
        return text

    def _say(self, text: str) -> None:
        if text.strip():
            self._print(self._session.say(text))

    def _obey(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name not in COMMANDS:
            raise UserError(f"no command {name}; /help lists them")
        run, about = COMMANDS[name]
        takes = about.split(":")[0].split()
        if bool(argument.strip()) != (len(takes) > 0) and takes != ["[TEXT]"]:
            raise UserError(f"{name} {takes[0]}" if takes else f"{name} takes no argument")
        run(self, argument.strip())

    def _print(self, parts: Generator[str]) -> None:
        """Stream an answer; Ctrl-C stops it, keeping the text so far."""
        if self._session.n_forgotten > self._n_forgotten:
            number = self._session.n_forgotten
            oldest = "oldest turn" if number == 1 else f"{number} oldest turns"
            self._tell(f"note: the context is full; the model no longer sees the {oldest}")
        self._n_forgotten = self._session.n_forgotten
        try:
            with closing(parts):
                for part in parts:
                    shown = part.translate(_CONTROLS) if self._interactive else part
                    print(shown, end="", file=self._output, flush=True)
        finally:
            print(file=self._output, flush=True)

    def _tell(self, line: str) -> None:
        print(line.translate(_CONTROLS), file=sys.stderr, flush=True)

    # --- commands

    def _help(self, _: str) -> None:
        for name, (_run, about) in COMMANDS.items():
            takes, _colon, what = about.rpartition(":")
            self._tell(f"{name} {takes}".ljust(18) + what.strip())
        self._tell(f"{_QUOTES} begins and ends a message of several lines")

    def _exit(self, _: str) -> None:
        raise _Left

    def _reset(self, _: str) -> None:
        self._session.restart()

    def _regenerate(self, _: str) -> None:
        self._print(self._session.answer_again())

    def _undo(self, _: str) -> None:
        self._session.take_back()

    def _system(self, text: str) -> None:
        if text:
            self._session.system = "" if text == _NOTHING else text
            self._session.n_forgotten = 0
        else:
            self._tell(self._session.system or "no system prompt")

    def _save(self, file: str) -> None:
        self._session.save(_path(file))
        self._tell(f"saved to {file}")

    def _load(self, file: str) -> None:
        n_chats = self._session.load(_path(file))
        if n_chats > 1:
            self._tell(f"note: the first of {n_chats} conversations")
        for message in self._session.messages:
            self._tell(f"{message['role']}: {message['content']}")


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from error


# Name, handler, and "argument: description".
COMMANDS: dict[str, tuple[Callable[[Terminal, str], None], str]] = {
    "/help": (Terminal._help, ":this list"),
    "/exit": (Terminal._exit, ":leave"),
    "/reset": (Terminal._reset, ":clear the conversation"),
    "/regenerate": (Terminal._regenerate, ":regenerate the last answer"),
    "/undo": (Terminal._undo, ":remove the last message and its answer"),
    "/system": (Terminal._system, f"[TEXT]:set the system prompt, {_NOTHING} for none, or show it"),
    "/save": (Terminal._save, "FILE:save the conversation as a row of chat data"),
    "/load": (Terminal._load, "FILE:continue the first conversation of a .jsonl file"),
}
