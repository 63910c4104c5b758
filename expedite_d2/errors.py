"""Which errors a user is told of in one sentence, and which keep their traceback."""

from __future__ import annotations

import dis
from types import TracebackType

#: What is raised on purpose, for reasons that the user can mend.
KINDS = (ValueError, OSError, KeyError, FloatingPointError)

UNFORESEEN = (
    "expedite_d2 did not foresee this error: if nothing above explains it, please report it in the "
    "project's issue tracker, with the whole traceback"
)

# The package, its benchmarks, and the script that was started, in its workers too.
_OURS = ("expedite_d2", "benchmarks", "__main__", "__mp_main__")


def sentence_of(error: BaseException) -> str | None:
    """What the command line says of an error; None for one that nobody raised on purpose.

    On purpose is one of `KINDS` by a ``raise`` statement of this package. The same kinds also come
    out of every library and of Python itself (a missing key of a dictionary, a number that is
    none), where their text is no sentence and the fault as a rule not the user's. Errors of the
    operating system tell what is wrong wherever they arise.
    """
    if not isinstance(error, KINDS):
        return None
    if not isinstance(error, OSError) and not _by_own_statement(error.__traceback__):
        return None
    # The text of a KeyError is otherwise the representation of its argument.
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return str(message) or type(error).__name__


def _by_own_statement(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is ours and was left by a ``raise`` statement."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    if str(frame.f_globals.get("__name__")).partition(".")[0] not in _OURS:
        return False
    return dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
