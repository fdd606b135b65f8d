"""The tree of all errors that the packages raise on purpose, with where each is defined.

    ValueError
        InputError              features.errors: bad input from outside, in one line: place, rule, value, remedy
            PlanError           study.plan.load: all faults of a plan, a line each
            MissingError        study.tracking.results: a store lacks what was asked for
                TooFewError     study.tracking.results: a figure needs more search trials than have a result
            UnreadError         study.tracking.results: what a store held cannot be read any more
        _RowError               features.domains.json_lines: what is wrong with a row whose place is not known yet
        SpaceError              search_spaces.reader: all faults of a search space, a line each
    Exception
        DownloadError           features.images.download: why a file could not be fetched
        UnreadableImageError    features.images.gather: why a file that is there is of no use
        NodeError               study.engine.worker: the fault of a node, not of the trial that it ran

The command line prints an InputError without a traceback and exits with code 2.
"""


class InputError(ValueError):
    """Bad input from outside; the message is one line: place, rule, value, remedy."""


def named_line(error: BaseException) -> str:
    """Return the class and the message of an error on one line."""
    return one_line(f"{type(error).__name__}: {error}")


def one_line(error: object, longest: int | None = None) -> str:
    """Return the message of an error (or any text) on one line, cut at `longest` characters."""
    return " ".join(str(error).split())[:longest]
