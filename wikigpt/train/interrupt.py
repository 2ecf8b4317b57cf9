"""Ctrl-C, SIGTERM and a closed terminal ask a run to stop where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable


class Stopped(Exception):
    """Raised inside work that is not worth finishing, such as an evaluation, when a signal has come."""


class Interrupt:
    """SIGINT, SIGTERM and SIGHUP (unless nohup has it ignored) ask the loop to stop after the step under way, and `notice` says
    so; a second SIGINT stops at once. Outside the main thread, where Python handles no signals, nothing is asked.
    """

    def __init__(self, notice: Callable[[], str] | None = None) -> None:
        self.signal: int | None = None
        self.notice = notice

    def __enter__(self) -> Interrupt:
        self.signal, self._before = None, {}
        if threading.current_thread() is threading.main_thread():
            names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
            wanted = [s for s in map(signal.Signals.__getitem__, names) if signal.getsignal(s) is not signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._handle) for s in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, *_: object) -> None:
        """Raises Stopped where a signal has come. Arguments are those of a progress report."""
        if self.signal is not None:
            raise Stopped

    def _handle(self, number: int, _: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.signal = self.signal is None, number
        if first and self.notice is not None:
            # Not print: the signal may have come in the middle of one. Whoever read it may have gone by the same signal.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: {self.notice()}\n".encode())


__all__ = ["Interrupt", "Stopped"]
