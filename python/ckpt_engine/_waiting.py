"""How threads and event loops of Python wait for the native module."""

from __future__ import annotations

import asyncio
from typing import Any, Callable

# Between two looks at signals.
TICK = 0.05
# For the end of what was cancelled: it ends at once, unless a library of the system is stuck.
SETTLE = 10.0


def block(wait: Callable[[float], bool]) -> None:
    """Waits on this thread, and lets signals interrupt it."""
    while not wait(TICK):
        pass


async def until(when: Callable[[Callable[[], None]], None]) -> None:
    """Waits on this event loop for a native object's one call back."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not future.done():
            future.set_result(None)

    # The call comes from a thread of the engine, or at once from this one.
    when(lambda: loop.call_soon_threadsafe(settle))
    await future


def settle(native: Any) -> None:
    """Cancels work, and waits for its end, so that the next call finds the engine free."""
    native.cancel()
    native.wait_done(SETTLE)


def run(job: Any) -> Any:
    """The result of a job, for a thread that waits for it."""
    try:
        block(job.wait_done)
    except BaseException:
        settle(job)
        raise
    return job.result()


async def run_async(job: Any) -> Any:
    """The result of a job, for an event loop."""
    try:
        await until(job.when_done)
    except BaseException:
        settle(job)
        raise
    return job.result()
