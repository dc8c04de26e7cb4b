"""`python -m lm.tools.launch.parent_death PARENT COMMAND …`: a command that dies with its parent.

A launcher that is killed outright cannot stop what it started, and an orphan would go on writing
into a folder that the next start believes its own. Linux kills the child instead; elsewhere this
only runs the command. The parent must start it from its main thread, whose death is what counts.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(command: Sequence[str]) -> list[str]:
    """The command that runs `command` as a child that dies with the calling process."""
    return [sys.executable, "-m", "lm.tools.launch.parent_death", str(os.getpid()), *command]


def main(parent: int, command: Sequence[str]) -> None:
    """Replace this process by `command`, unless `parent` has died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.exit(f"error: cannot start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
