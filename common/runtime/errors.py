"""The error a user can act on; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake in the input. The message is one line: where, what was found, what is allowed, what to do."""
