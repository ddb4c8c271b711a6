"""Drives a trainer's engine and its rollouts through whole updates.

The engines move weights. What a program does around that (set requests aside, give up caches, go on with the new version)
is the same in every program: :class:`Manager` does it in the right order, and resumes rollouts after a failure too.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Union

from .engine import Destination, PlacedRollout, ReceivedWeights, RolloutEngine, TrainerEngine
from .reports import SendReport


# A rollout that failed may never have entered the update: the trainer would wait for it to its deadline. It has this long to fail
# by itself, since its error names the cause.
GRACE = 1.0


class RolloutWorker:
    """A rollout as a :class:`Manager` drives it: derive from it.

    Every method is a plain one, which runs in a thread, or an ``async`` one, which runs on the loop: for an actor of Ray,
    ``async def update(self, version): return await self.actor.update.remote(version)``.
    """

    def update(self, version: int) -> Any:
        """Receives a version and installs it; what it returns is the manager's report of this rollout."""
        raise NotImplementedError

    def finalize(self) -> Any:
        """Leaves the group."""

    def pause(self) -> Any:
        """Before an update: finish the requests in flight, or set them aside."""

    def release_cache(self) -> Any:
        """After all rollouts are paused: give up memory that the update needs, such as the key/value cache."""

    def resume(self, active: int | None) -> Any:
        """After an update, however it ended.

        Args:
            active: The version that is active now; ``None`` if the update failed. Then the version before is, except on a rollout
                that lends its tensors, which may hold none: :attr:`PlacedRollout.version` says so. It must not serve.
        """


class LocalRollout(RolloutWorker):
    """A rollout of this process.

    Args:
        engine: Its engine.
        load: Where its weights go: a :class:`Destination`, or a function that takes :class:`ReceivedWeights` and loads all of
            them, in a thread. Nothing for a :class:`PlacedRollout`: trainers write into the tensors that it lends.
        framework: As :meth:`RolloutEngine.receive_weights`, for such a function.

    Raises:
        TypeError: If `load` is missing, or is given to a rollout that lends its tensors.
    """

    def __init__(
        self,
        engine: RolloutEngine | PlacedRollout,
        load: Union[Destination, Callable[[ReceivedWeights], Any], None] = None,
        *,
        framework: str | None = None,
    ) -> None:
        if isinstance(engine, PlacedRollout) != (load is None):
            raise TypeError(
                "a rollout has `load`, where its weights go, unless it lends its tensors"
            )
        self.engine = engine
        self._load = load
        self._framework = framework

    def update(self, version: int) -> Any:
        if isinstance(self.engine, PlacedRollout):
            return self.engine.update(version)
        if isinstance(self._load, Destination):
            return self.engine.receive_into(self._load, version)
        assert self._load is not None
        with self.engine.receive_weights(version, framework=self._framework) as weights:
            self._load(weights)
            return weights.finish()

    def finalize(self) -> None:
        self.engine.finalize()


class Manager:
    """A trainer and its rollouts, driven together: pause, free caches, send while all receive, resume.

    One update at a time.

    Args:
        trainer: The engine of the trainer of rank 0, made by :func:`form_group`.
        rollouts: All rollouts of its group.
    """

    def __init__(self, trainer: TrainerEngine, rollouts: Iterable[RolloutWorker]) -> None:
        self.trainer = trainer
        self.rollouts = list(rollouts)

    def update_weights(
        self, weights: Iterable[tuple[str, Any]] | Mapping[str, Any], version: int
    ) -> tuple[SendReport, list[Any]]:
        """Runs one update.

        The iterator of `weights` runs on the calling thread.

        Args:
            weights: As :meth:`TrainerEngine.send_weights`.
            version: The weights' number.

        Returns:
            What was sent, and what each rollout's ``update`` returned, in their order.

        Raises:
            Exception: The trainer's error if it has one within a second of a rollout's, since it names the cause; else the
                first of a rollout, and the update is aborted on every rank. All rollouts have been resumed before it is raised.
        """
        return asyncio.run(self.update_weights_async(weights, version))

    async def update_weights_async(
        self,
        weights: Iterable[tuple[str, Any]] | AsyncIterable[tuple[str, Any]] | Mapping[str, Any],
        version: int,
    ) -> tuple[SendReport, list[Any]]:
        """As :meth:`update_weights`, for an event loop. A task that is cancelled aborts the update on every rank, and rollouts
        are resumed."""
        active = None
        resumed: list[Any] = []
        try:
            _first_error(await self._all("pause"))
            _first_error(await self._all("release_cache"))
            sent, received = await self._run(weights, version)
            active = version
        finally:
            resumed = await self._all("resume", active)
        _first_error(resumed)
        return sent, received

    async def _run(self, weights: Any, version: int) -> tuple[SendReport, list[Any]]:
        sending = asyncio.ensure_future(self.trainer.send_weights_async(weights, version))
        receiving = [asyncio.ensure_future(_call(rollout.update, version)) for rollout in self.rollouts]
        try:
            done: set[asyncio.Future[Any]] = set()
            if receiving:
                done, _ = await asyncio.wait(receiving, return_when=asyncio.FIRST_EXCEPTION)
            failed = [task for task in done if task.exception() is not None]
            if failed:
                await asyncio.wait([sending], timeout=GRACE)
                if not sending.done():
                    # What others fail with from now on comes of it.
                    await _cancelled([sending])
                    await asyncio.wait(receiving)
                    raise failed[0].exception()
            sent, *received = await asyncio.gather(sending, *receiving, return_exceptions=True)
        except BaseException:
            await _cancelled([sending, *receiving])
            raise
        _first_error([sent, *received])
        return sent, received

    def finalize(self) -> None:
        """Ends every worker's part in the group; raises the first failure when all have been ended."""
        asyncio.run(self.finalize_async())

    async def finalize_async(self) -> None:
        """As :meth:`finalize`, for an event loop."""
        trainer = await asyncio.gather(self.trainer.finalize_async(), return_exceptions=True)
        _first_error([*trainer, *await self._all("finalize")])

    async def _all(self, hook: str, *arguments: Any) -> list[Any]:
        """One hook of all rollouts, at the same time: what each returned or raised."""
        calls = [_call(getattr(rollout, hook), *arguments) for rollout in self.rollouts]
        return await asyncio.gather(*calls, return_exceptions=True)


async def _cancelled(tasks: list[asyncio.Future[Any]]) -> None:
    """Cancels tasks, and waits for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _call(hook: Callable[..., Any], *arguments: Any) -> Any:
    if inspect.iscoroutinefunction(hook):
        return await hook(*arguments)
    result = await _in_own_thread(hook, *arguments)
    # A plain function may return what is awaited, such as a reference of Ray.
    return await result if inspect.isawaitable(result) else result


async def _in_own_thread(hook: Callable[..., Any], *arguments: Any) -> Any:
    """As asyncio.to_thread, whose pool has fewer threads than a group may have rollouts: all of them wait for one another."""
    pool = ThreadPoolExecutor(1, "ckpt-rollout")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, hook, *arguments)
    finally:
        # The loop does not wait for a hook whose task was cancelled.
        pool.shutdown(wait=False)


def _first_error(results: Iterable[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result
