"""The engine's log records, for `logging`."""

from __future__ import annotations

import atexit
import logging
import threading

from . import _native

LOGGER = logging.getLogger("ckpt_engine")
LOGGER.addHandler(logging.NullHandler())

_started = threading.Lock()


def enable_logging(level: int | str = logging.INFO) -> bool:
    """Hands what the engine logs to the loggers below ``ckpt_engine``.

    Args:
        level: The lowest level that is collected, in this process and to its end: a number or a name of
            `logging`. Records below it cost nothing.

    Returns:
        Whether this was the first call of the process; later ones change nothing.
    """
    if isinstance(level, str):
        number = logging.getLevelName(level.upper())
        if not isinstance(number, int):
            raise ValueError(f"logging has no level {level!r}")
        level = number
    if not _started.acquire(blocking=False):
        return False
    if not _native.collect_logs(max(0, min(level, 50))):
        return False
    stop = threading.Event()
    thread = threading.Thread(target=_forward, args=(stop,), name="ckpt-logging", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join(1.0)
        _hand_over(0.0)

    atexit.register(end)
    return True


def _forward(stop: threading.Event) -> None:
    while not stop.is_set():
        _hand_over(0.2)


def _hand_over(seconds: float) -> None:
    for level, target, text in _native.next_logs(seconds):
        name = target if target.startswith("ckpt_engine") else f"ckpt_engine.{target}"
        logger = logging.getLogger(name)
        if logger.isEnabledFor(level):
            logger.handle(logger.makeRecord(name, level, target, 0, text, (), None))
