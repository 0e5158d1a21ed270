"""The one exception that a user's mistake may raise."""


class UserError(Exception):
    """A fault in what the user gave: a file, a flag, a model folder.

    The message is one to three lines: what is wrong, why, and what to do. Commands print it
    without a trace (`cli.main`); library callers catch it like any exception.
    """

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        super().__init__("\n".join(line for line in (what, why, do) if line))
