"""The one exception that a user's mistake raises: its text is the whole message, and no traceback is shown."""


class UserError(ValueError):
    """One sentence: what is wrong, what was given, what to do. `sslvit` prints it and exits with status 2."""
