"""Which errors a user is told of in one sentence, and which keep their traceback."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

Main = TypeVar("Main", bound=Callable[..., Any])

#: What is raised on purpose, for reasons that the user can mend.
KINDS = (ValueError, OSError, KeyError, FloatingPointError, ImportError)

UNFORESEEN = (
    "expedite_d2 did not foresee this error: if nothing above explains it, please report it in the "
    "project's issue tracker, with the whole traceback"
)

# The package, its benchmarks, and the script that was started, in its workers too.
_OURS = ("expedite_d2", "benchmarks", "__main__", "__mp_main__")


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """A context of imports that an extra of this package brings.

    Args:
        name: the extra.

    Raises:
        ImportError: one of them is not installed; the sentence names it and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "expedite_d2":
            raise
        raise ImportError(
            f"{error.name} is not installed: this part of expedite_d2 needs its extra {name!r}, "
            f"pip install --no-build-isolation 'expedite_d2[{name}]' (in a checkout '.[{name}]')",
            name=error.name,
        ) from error


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


def cli(main: Main) -> Main:
    """Decorate a command-line ``main``: an error raised on purpose becomes one line and code 2.

    Every other one keeps its traceback, with a line that says where to report it.
    """

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is not None:
                print(f"error: {sentence}", file=sys.stderr)
                raise SystemExit(2) from None
            if hasattr(error, "add_note"):
                error.add_note(UNFORESEEN)
            else:  # Python 3.10 has no notes
                print(UNFORESEEN, file=sys.stderr)
            raise

    return guarded  # type: ignore[return-value]
