"""The one error that bad input raises in `features` and `trainables`."""


class InputError(ValueError):
    """Bad input from outside; the message is one line: place, rule, value, remedy.

    The command line prints it without a traceback and exits with code 2.
    """
