"""The one exception a user may cause.

Anything that is the input's fault (a missing or broken file, an unknown name, a full disk) is raised as
`TrailmedError` with one line that names the file, says what is wrong and what to do. The command line prints
that line on stderr and exits with `EXIT_BAD_INPUT`; a traceback always means a bug of ours.
"""

from __future__ import annotations

EXIT_BAD_INPUT = 2
EXIT_GATE_FAILED = 3


class TrailmedError(Exception):
    """Bad input: the message is one line, fit to be shown as it is."""
