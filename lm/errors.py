"""The one exception for what a user can cause: shown as a single line, never as a traceback."""


class UserError(Exception):
    """A mistake the user can correct; the message says what, where and what to do.

    The command line prints it on one line and exits with code 2.
    """
