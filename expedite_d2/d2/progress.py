"""How far a long loop is: a bar on a terminal, a log line from time to time elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

PERIOD = 30.0  # seconds without a line, at most

Item = TypeVar("Item")


@contextmanager
def progress(
    items: Iterable[Item],
    description: str,
    *,
    unit: str,
    total: int | None = None,
    shown: bool = True,
) -> Iterator[Iterable[Item]]:
    """A context that gives the same items and shows how many are done.

    Args:
        items: what is gone through, once.
        description: what is done with them: "evaluating".
        unit: what one of them is, for the bar: "image".
        total: how many there are; by default their length, where they have one.
        shown: whether to show anything; of several processes, one does.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if not shown:
        yield items
    elif sys.stderr.isatty():
        with tqdm(items, desc=description, unit=unit, total=total) as bar:
            yield bar
    else:
        with Heartbeat(description, total) as heartbeat:
            yield heartbeat.follow(items)


class Heartbeat:
    """A context in which a thread logs how far a loop is, every `PERIOD` seconds.

    A thread, because a single step may take longer: one image of a large model on a CPU.

    Attributes:
        done: steps that are done, those of an earlier run among them.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            description: what is done.
            total: steps in all; None where it is not known.
            done: steps that an earlier run has done.
            clock: seconds from any moment on.
        """
        self.description = description
        self.total = total
        self.done = self._first = done
        self._clock = clock
        self._start = self._last = clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def follow(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, each of which is a step."""
        for item in items:
            self.start()
            yield item
            self.done += 1

    def start(self) -> None:
        """Let the thread run from now on: after the first item, when loaders have forked."""
        if self._thread.ident is None:
            self._thread.start()

    def told(self) -> None:
        """Put the next line off: somebody has just logged how far the loop is."""
        self._last = self._clock()

    def beat(self) -> None:
        """Log a line if one is due."""
        if self.due() <= 0:
            logger.info("%s", self.line())
            self.told()

    def due(self) -> float:
        """Seconds until the next line."""
        return max(0.0, self._last + PERIOD - self._clock())

    def line(self) -> str:
        """What there is to say now."""
        elapsed = self._clock() - self._start
        of = "" if self.total is None else f" of {self.total}"
        words = f"{self.description}: {self.done}{of}, {_duration(elapsed)} so far"
        steps = self.done - self._first
        if self.total is None or not steps:
            return words
        return f"{words}, about {_duration(elapsed / steps * (self.total - self.done))} left"

    def _run(self) -> None:
        while not self._stop.wait(self.due()):
            self.beat()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
