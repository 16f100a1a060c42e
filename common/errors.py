"""Errors that are the user's to mend, and the exit statuses of a run."""

EXIT_USER_ERROR = 2
EXIT_SIGINT = 130  # 128 + SIGINT, as shells report it
EXIT_SIGTERM = 143  # 128 + SIGTERM

WRITER_FAILED = ("PytorchStreamWriter", "inline_container", "iostream error")
"""How torch.save reports a full disk: as a RuntimeError of its zip writer or of the C++ stream."""


class UserError(ValueError):
    """Something outside the code is wrong; the message says what, where, and what to do.

    A script ends with the message alone and status 2.
    """


class Interrupted(BaseException):
    """A SIGINT or SIGTERM was honoured: the checkpoint is saved, the process may end.

    Derives from BaseException so that no ``except Exception`` on the way swallows it.
    """

    def __init__(self, signal_number: int, what_is_left: str = "saved"):
        super().__init__(signal_number)
        self.exit_status = 128 + signal_number
        self.what_is_left = what_is_left


def in_words(error: Exception) -> str:
    """What an error says; of one of the system the path and what is wrong, without its number."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return str(error)
