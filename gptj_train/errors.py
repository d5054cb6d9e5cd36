"""The one exception that stands for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the request, the config or the input files.

    The message is a single line: what is wrong, where, and what to do. ``launch.recipe`` prints it without a
    traceback and exits with code 2. Any other exception is a bug of ours: traceback, exit code 1.
    """
