"""The error a user can act on; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake in the input: where, what was found, what is allowed, what to do. Each argument is one line."""

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


def printable(text: str) -> str:
    """`text` as one line that a terminal only shows: \\n, \\x1b and the like in the place of what it would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
