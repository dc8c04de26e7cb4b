"""Exception for mistakes of the user."""


class UserError(Exception):
    """Mistake that the user can correct; the message says what, where and what to do.

    The command line prints it on one line and exits with code 2.
    """
