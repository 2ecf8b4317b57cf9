"""The one exception that is meant for the user's eyes, and a check of integers."""

import operator
from typing import Any


class UserError(Exception):
    """One line that names the problem and the way out; the command line prints it and exits with status 2."""


def integer(name: str, value: Any) -> int:
    """An integer of any type, numpy's included. TypeError that names the argument for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is int") from None
