"""The runtime type checker that the tests switch on."""

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def typechecked(function):
    """beartype, except on methods annotated with Self, which it takes only together with their class."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
