"""Errors that a user can mend: shown as one line, never as a traceback."""


class UserError(Exception):
    """Wrong input, missing data or an environment that lacks something.

    The message says what is wrong and what to do. The command line prints it as one line
    and every rank leaves with a non-zero exit status.
    """


class BadImage(UserError):
    """An image that is missing or cannot be decoded; the message names it."""


class NotKnownYet(UserError):
    """What a plan is made of and a run finds out as it starts; the message says how to know it."""


class InfeasiblePlan(UserError):
    """No dual-batch plan exists for these numbers; the message names the range that works."""
