"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """One line that names the problem and the way out; the command line prints it and exits with status 2."""
