"""The errors memopt raises on purpose. Each message says what was wrong, where, and what to do."""


class MemoptError(Exception):
    """Base of them all. The command line prints its message and exits with code 2."""


class InputError(MemoptError, ValueError):
    """Bad input: an argument, an option, a file."""


class UnknownPass(InputError):
    """No pass of that name exists."""


class DoesNotFit(MemoptError):
    """Not even the smallest batch fits a budget."""


class NothingToDo(MemoptError):
    """A pass found nothing to change in this model."""


class PassConflict(MemoptError):
    """Two passes would change the same thing."""


class AlreadyApplied(PassConflict):
    """The same pass, with the same options, is active already."""
