"""The one exception for mistakes that a user can make and mend."""


class UserError(ValueError):
    """Bad input: the message names the field or file, its value, and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """
