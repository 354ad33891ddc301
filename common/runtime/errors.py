"""The error a user can act on; everything else is a bug and keeps its traceback."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """A mistake in the input: where, what was found, what is allowed, what to do. Each argument is one line."""

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class SettingNeededError(UserError):
    """The input will do, and a setting must say what it does not say itself."""


def printable(text: str) -> str:
    """`text` as one line that a terminal only shows: \\n, \\x1b and the like in the place of what it would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Parser(argparse.ArgumentParser):
    """Words of a command; a mistake among them is one line, as any other, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}; see {self.prog} --help\n")
