"""How a run can end other than well, apart from errors of the program."""

from dora_dist.runtime.exit_codes import LOST_RANK


class UserError(ValueError):
    """Bad input: the message names the field or file, its value, and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """


class LostRank(RuntimeError):
    """Another rank failed, died or did not answer in time; the message says which and what is known of it.

    `code`: the exit status that goes with it (exit_codes.py).
    """

    def __init__(self, text: str, code: int = LOST_RANK) -> None:
        super().__init__(text)
        self.code = code


class FailedAlone(RuntimeError):
    """This rank failed while the others wait for it in a collective: no agreement with them is possible."""


class Stopped(BaseException):
    """The run was asked to stop, and did; not an Exception, so that nobody takes it for a failure to handle."""
