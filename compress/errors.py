"""The errors a user is meant to read."""


class PocketclipError(Exception):
    """Bad input: one message that names the place and the remedy; `cli.py` prints it and exits."""

    exit_code = 2


class GateFailed(PocketclipError):
    """A budget or parity gate was missed: the artifact exists, but must not be shipped."""

    exit_code = 1
