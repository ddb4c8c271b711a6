"""Groups, and the engines at their ends.

Every method that waits has two forms: the plain one blocks its thread, and the one whose name ends in
``_async`` is awaited. Neither holds the interpreter while it works or waits. Ctrl-C, and the cancellation of a
task, end a wait at once and abort the update on every rank; the next update works.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Union

from . import _native
from ._waiting import SETTLE, block, run, run_async, settle, until
from .errors import AbortedError, Error, SourceError, StateError
from .reports import (
    Peer,
    ReceiveReport,
    SendReport,
    _peers,
    _receive_report,
    _send_report,
)

_LOGGER = logging.getLogger("ckpt_engine.engine")

Config = Union[Mapping[str, Any], str, "os.PathLike[str]", None]

_CONVERSIONS: dict[str | None, Callable[[Any], Any] | None] = {
    None: None,
    # The native module makes them.
    "torch": None,
    "numpy": _native.Tensor.numpy,
}


def _config(config: Config) -> tuple[str | None, str | None]:
    """A configuration as the native module takes it: JSON, or a path."""
    if config is None:
        return None, None
    if isinstance(config, Mapping):
        return json.dumps(dict(config)), None
    return None, os.fspath(config)


def check_config(config: Config) -> None:
    """Checks a configuration.

    Args:
        config: A mapping, or the path of a ``.yaml``, ``.toml`` or ``.json`` file.

    Raises:
        ConfigError: Naming the key, and the known ones where it is not known.
    """
    _native.check_config(*_config(config))


class Channel:
    """Messages of a program's own, on the connection that a rank has to the trainer of rank 0.

    A rollout talks to rank 0, and rank 0 to every rank.
    """

    def __init__(self, native: Any) -> None:
        self._native = native

    def send(self, to: int, body: bytes) -> None:
        """Queues a message; never blocks.

        Raises:
            ResourceError: If too many messages wait that the other side has not read.
        """
        self._native.send(to, body)

    def recv(self, timeout: float) -> tuple[int, bytes] | None:
        """The next message as ``(rank of the sender, body)``; ``None`` when `timeout` seconds have passed.

        Raises:
            PeerLost: When a rank is lost; the next call goes on.
        """
        return run(self._native.recv(timeout))

    async def recv_async(self, timeout: float) -> tuple[int, bytes] | None:
        """As :meth:`recv`, for an event loop."""
        return await run_async(self._native.recv(timeout))


class ControlPlane:
    """A rank's one encrypted connection to its group: made by :meth:`lead` on the trainer of rank 0 and by
    :meth:`join` on all others."""

    def __init__(self, native: Any) -> None:
        self._native = native

    @classmethod
    def lead(
        cls, address: str, token: bytes, *, heartbeat_timeout: float | None = None
    ) -> ControlPlane:
        """Leads a group, as its rank 0.

        Args:
            address: Where to listen: ``"host:port"`` (port 0 takes any that is free; :attr:`address` says which),
                ``"unix:/path"`` or ``"unix:@name"``.
            token: The group's secret, of :func:`generate_token` or :func:`read_token`.
            heartbeat_timeout: The silence in seconds after which a rank is lost; 10 unless set.

        Raises:
            ConfigError: For an address or a token that cannot be used.
            IoError: If the address cannot be bound.
        """
        return cls(run(_native.Control.lead(address, token, heartbeat_timeout)))

    @classmethod
    async def lead_async(
        cls, address: str, token: bytes, *, heartbeat_timeout: float | None = None
    ) -> ControlPlane:
        """As :meth:`lead`, for an event loop."""
        return cls(await run_async(_native.Control.lead(address, token, heartbeat_timeout)))

    @classmethod
    def join(
        cls,
        address: str,
        token: bytes,
        *,
        role: str = "rollout",
        rank: int | None = None,
        connect_timeout: float | None = None,
        heartbeat_timeout: float | None = None,
    ) -> ControlPlane:
        """Joins the group that is led at an address; the leader may start later.

        Args:
            address: The leader's :attr:`address`.
            token: The group's secret.
            role: ``"rollout"`` or ``"trainer"``.
            rank: The number to have; the lowest free one unless set.
            connect_timeout: How many seconds to try; 60 unless set.
            heartbeat_timeout: As :meth:`lead`.

        Raises:
            TimeoutError: If no leader answers.
            AuthenticationError: If the tokens differ.
            MismatchError: If a live process has the rank.
        """
        arguments = cls._join(address, token, role, rank, connect_timeout, heartbeat_timeout)
        return cls(run(_native.Control.join(*arguments)))

    @classmethod
    async def join_async(
        cls,
        address: str,
        token: bytes,
        *,
        role: str = "rollout",
        rank: int | None = None,
        connect_timeout: float | None = None,
        heartbeat_timeout: float | None = None,
    ) -> ControlPlane:
        """As :meth:`join`, for an event loop."""
        arguments = cls._join(address, token, role, rank, connect_timeout, heartbeat_timeout)
        return cls(await run_async(_native.Control.join(*arguments)))

    @staticmethod
    def _join(address: str, token: bytes, role: str, *others: Any) -> tuple[Any, ...]:
        if role not in ("rollout", "trainer"):
            raise ValueError(f"role is 'rollout' or 'trainer', not {role!r}")
        return (address, token, role == "trainer", *others)

    @property
    def address(self) -> str:
        """Where to join, with the port that was taken."""
        return self._native.address

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._native.rank

    @property
    def role(self) -> str:
        """``"trainer"`` or ``"rollout"``."""
        return "trainer" if self._native.is_trainer else "rollout"

    @property
    def ranks(self) -> list[int]:
        """The ranks of the group; on rank 0 those that live now."""
        return self._native.ranks()

    def channel(self, number: int = 0) -> Channel:
        """Opens a channel for messages of the program's own; both sides use the same number."""
        return Channel(self._native.channel(number))

    def barrier(self, name: str, timeout: float = 60.0) -> None:
        """Waits until all ranks of the group are in the barrier of this name.

        Raises:
            TimeoutError: Naming the ranks that are missing.
            PeerLost: When one of them dies.
        """
        run(self._native.barrier(name, timeout))

    async def barrier_async(self, name: str, timeout: float = 60.0) -> None:
        """As :meth:`barrier`, for an event loop."""
        await run_async(self._native.barrier(name, timeout))

    def close(self) -> None:
        """Says goodbye to the group, and ends the connection."""
        run(self._native.close())

    async def close_async(self) -> None:
        """As :meth:`close`, for an event loop."""
        await run_async(self._native.close())

    def __enter__(self) -> ControlPlane:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> ControlPlane:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close_async()

    def __repr__(self) -> str:
        return f"<ckpt_engine.ControlPlane rank {self.rank}, {self.role}, at {self.address}>"


class _Engine:
    """What both ends have."""

    def __init__(
        self, native: Any, control: ControlPlane | None, rank: int, peers: tuple[Peer, ...]
    ) -> None:
        self._native = native
        self.control = control
        self.rank = rank
        self.peers = peers

    def finalize(self) -> None:
        """Frees the buckets, and leaves the group; the control plane stays."""
        run(self._native.finalize())

    async def finalize_async(self) -> None:
        """As :meth:`finalize`, for an event loop."""
        await run_async(self._native.finalize())

    def __repr__(self) -> str:
        return f"<ckpt_engine.{type(self).__name__} rank {self.rank}>"


class TrainerEngine(_Engine):
    """The end that sends: made by :func:`form_group`.

    Attributes:
        rank: This rank's number.
        peers: All ranks, as they were when the group was formed.
        control: The control plane; ``None`` within one process.
    """

    def send_weights(
        self,
        weights: Iterable[tuple[str, Any]] | Mapping[str, Any],
        version: int,
        *,
        part: bool = False,
    ) -> SendReport:
        """Sends every weight to all rollouts; returns when all of them have confirmed.

        The iterator runs on the calling thread, ahead of the engine by at most 4096 tensors and 64 MiB, 1 GiB on a GPU (or one
        tensor, where it is larger). Tensors are read in place: keep them unchanged until this returns, with an
        error or without. Every update has the names of the update before.

        Args:
            weights: Pairs of a checkpoint's name and a tensor, of any shape and strides, or a mapping of
                them. A tensor is one of torch (on the CPU or a CUDA device, parameters and FP8 included), of
                numpy (with the types of ml_dtypes), of whatever has ``__dlpack__`` (jax, cupy), an object with
                the buffer protocol, or a :class:`Tensor`.
            version: The weights' number: verl's ``global_steps``.
            part: Whether `weights` are only a part of the version, such as an adapter. All others are those of the version that was
                sent last: they are neither read nor compared, and come out of the copy that ``delta: true`` keeps.

        Returns:
            What was sent, to whom, and where the time went.

        Raises:
            SourceError: If the iterator raises: from what it raised.
            WeightError: For a tensor that cannot be sent, with its name.
            PeerLost: If a rollout dies: `rank` says which. The next update goes to those that are left.
            TimeoutError: If a rank makes no step within ``timeout_seconds``.
            ConfigError: With `part`, if ranks keep no copies; ``StateError`` if there is no version yet, or no copy of it.
            Error: The first failure of any rank.
        """
        if hasattr(weights, "__aiter__"):
            raise TypeError("weights is an asynchronous iterable: use send_weights_async")
        iterator = _iterator(weights)
        sending = self._native.send(version, part)
        try:
            try:
                more = True
                while more:
                    block(sending.wait_wanted)
                    more = not sending.done and sending.pull(iterator)
            except Exception as error:
                sending.fail(f"{type(error).__name__}: {error}")
                block(sending.wait_done)
                _raise(sending, error)
            block(sending.wait_done)
        except BaseException:
            settle(sending)
            raise
        return _send_report(sending.result())

    async def send_weights_async(
        self,
        weights: Iterable[tuple[str, Any]] | AsyncIterable[tuple[str, Any]] | Mapping[str, Any],
        version: int,
        *,
        part: bool = False,
    ) -> SendReport:
        """As :meth:`send_weights`, for an event loop, and for asynchronous iterables too.

        A plain iterator runs on the loop's thread. Put :func:`in_thread` around one that blocks.
        """
        source: Any = weights.__aiter__() if hasattr(weights, "__aiter__") else None
        iterator = _iterator(weights) if source is None else None
        sending = self._native.send(version, part)
        try:
            try:
                if source is not None:
                    async for item in source:
                        if not sending.put(item):
                            await until(sending.when_wanted)
                            if sending.done:
                                break
                    else:
                        sending.end()
                else:
                    more = True
                    while more:
                        await until(sending.when_wanted)
                        more = not sending.done and sending.pull(iterator)
            except Exception as error:
                sending.fail(f"{type(error).__name__}: {error}")
                await until(sending.when_done)
                _raise(sending, error)
            await until(sending.when_done)
        except BaseException:
            settle(sending)
            raise
        return _send_report(sending.result())

    def attest(self) -> SendReport:
        """Proves that all rollouts hold the version that was sent last: every rank computes the digest of its copy anew
        from memory.

        Copies are kept with ``delta: true``. Rollouts take part as in an update: they receive that version once more, of
        which no bytes travel.

        Raises:
            DigestError: If bytes have changed by themselves: `rank` and `tensor` say where. The next update is whole.
            MismatchError: If a rollout does not have the version: `rank` says which.
            StateError: If there is no version yet, or the trainer has no copy of it.
            ConfigError: If ranks keep no copies.
            Error: As :meth:`send_weights`.
        """
        return _send_report(run(self._native.attest()))

    async def attest_async(self) -> SendReport:
        """As :meth:`attest`, for an event loop."""
        return _send_report(await run_async(self._native.attest()))

    def __enter__(self) -> TrainerEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finalize()

    async def __aenter__(self) -> TrainerEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.finalize_async()


def _iterator(weights: Any) -> Iterator[Any]:
    return iter(weights.items() if isinstance(weights, Mapping) else weights)


def _raise(sending: Any, cause: Exception) -> None:
    """Raises the error of an update whose iterator raised."""
    if isinstance(cause, Error):
        raise cause
    try:
        sending.result()
    except Error as error:
        raise error from cause
    raise SourceError(f"{type(cause).__name__}: {cause}") from cause


async def in_thread(
    weights: Iterable[tuple[str, Any]] | Mapping[str, Any],
) -> AsyncIterator[tuple[str, Any]]:
    """An iterator that blocks (it gathers shards, or reads a disk), on a thread of its own.

    Args:
        weights: As :meth:`TrainerEngine.send_weights`. All of it runs on the one thread; what is bound to the
            loop's thread (torch's grad mode, the current CUDA device) has to be set within it.
    """
    iterator = _iterator(weights)

    def batch() -> tuple[list[tuple[str, Any]], bool, Exception | None]:
        items: list[tuple[str, Any]] = []
        end = time.monotonic() + 0.002
        try:
            for item in iterator:
                items.append(item)
                if len(items) >= 64 or time.monotonic() > end:
                    return items, True, None
        except Exception as error:
            return items, False, error
        return items, False, None

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1, "ckpt-source") as pool:
        more = True
        while more:
            items, more, error = await loop.run_in_executor(pool, batch)
            for item in items:
                yield item
            del items
            if error is not None:
                raise error


class ReceivedWeights:
    """The weights of one update, as they come: an iterator, and an asynchronous one, of ``(name, tensor)``.

    The version becomes active, on all ranks, when everything was taken. Every byte was verified before it
    is given out. Leaving earlier aborts the update on every rank; used in a ``with`` block, an exception in it
    tells the other ranks why.

    A tensor keeps its bucket, of which an update has two: the trainer waits for it, to its deadline. Copy what has
    to stay, drop the rest (``copy=True`` copies). Tensors are read-only.
    """

    def __init__(self, receiving: Any, convert: Callable[[Any], Any] | None) -> None:
        self._receiving = receiving
        self._convert = convert
        self._left = False
        #: The version that is arriving.
        self.version: int = receiving.version
        #: What was received, once all was.
        self.report: ReceiveReport | None = None

    def __iter__(self) -> ReceivedWeights:
        return self

    def __next__(self) -> tuple[str, Any]:
        while True:
            item = self._next()
            if item is not None:
                return item
            if self.report is not None:
                raise StopIteration
            try:
                block(self._receiving.wait_more)
            except BaseException:
                settle(self._receiving)
                raise

    def __aiter__(self) -> ReceivedWeights:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        while True:
            item = self._next()
            if item is not None:
                return item
            if self.report is not None:
                raise StopAsyncIteration
            try:
                await until(self._receiving.when_more)
            except BaseException:
                settle(self._receiving)
                raise

    def _next(self) -> tuple[str, Any] | None:
        item = self._receiving.take()
        if item is None:
            self._see()
            return None
        convert = self._convert
        return item if convert is None else (item[0], convert(item[1]))

    def _see(self) -> None:
        """Nothing is here: is the update over?"""
        if self.report is None and self._receiving.done:
            self.report = _receive_report(self._receiving.result())

    def buckets(self) -> Iterator[list[tuple[str, Any]]]:
        """The same, as a list of tensors per bucket, for work on many tensors at once.

        A list keeps its bucket, as each of its tensors does: drop it before the next one, or with it.
        """
        while True:
            items = self._next_bucket()
            if items is not None:
                yield items
                del items
                continue
            if self.report is not None:
                return
            try:
                block(self._receiving.wait_more)
            except BaseException:
                settle(self._receiving)
                raise

    async def buckets_async(self) -> AsyncIterator[list[tuple[str, Any]]]:
        """As :meth:`buckets`, for an event loop."""
        while True:
            items = self._next_bucket()
            if items is not None:
                yield items
                del items
                continue
            if self.report is not None:
                return
            try:
                await until(self._receiving.when_more)
            except BaseException:
                settle(self._receiving)
                raise

    def _next_bucket(self) -> list[tuple[str, Any]] | None:
        items = self._receiving.take_bucket()
        if items is None:
            self._see()
            return None
        convert = self._convert
        return items if convert is None else [(name, convert(item)) for name, item in items]

    def finish(self) -> ReceiveReport:
        """Takes the rest, ignoring it, and returns the report."""
        for _ in self:
            pass
        assert self.report is not None
        return self.report

    async def finish_async(self) -> ReceiveReport:
        """As :meth:`finish`, for an event loop."""
        async for _ in self:
            pass
        assert self.report is not None
        return self.report

    def abort(self, reason: str = "the rollout gave the update up") -> None:
        """Gives the update up, on every rank; does nothing once all was taken."""
        self._left = True
        self._receiving.fail(reason)
        block(self._receiving.wait_done)

    def _reason(self, error: BaseException | None) -> str | None:
        if self.report is not None or self._left:
            return None
        # A generator that is closed around this says nothing of why.
        if error is not None and not isinstance(error, GeneratorExit):
            return f"{type(error).__name__}: {error}"
        return "the rollout left the update before its end"

    def __enter__(self) -> ReceivedWeights:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        reason = self._reason(error)
        if reason is not None:
            self.abort(reason)
            if error is None:
                raise AbortedError(reason, version=self.version, recovery="Retry")

    async def __aenter__(self) -> ReceivedWeights:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        reason = self._reason(error)
        if reason is not None:
            self._left = True
            self._receiving.fail(reason)
            await until(self._receiving.when_done)
            if error is None:
                raise AbortedError(reason, version=self.version, recovery="Retry")

    def __repr__(self) -> str:
        return f"<ckpt_engine.ReceivedWeights of version {self.version}>"


class Destination:
    """Tensors of a program's own that updates are copied into: for :meth:`RolloutEngine.receive_into`.

    Their memory is read once, here, and stays: tensors of torch keep their storage (do not resize it), arrays of numpy
    themselves. One destination serves one update at a time, of any engine.

    Args:
        tensors: Pairs of a checkpoint's name and a tensor, or a mapping of them (a ``state_dict()``). Contiguous tensors of
            torch, on the CPU or CUDA devices, also several, or writable arrays of numpy. No two of them share memory: of tied
            weights give the one that travels.
        partial: Whether an update may bring only some of them; the others stay as they are.

    Raises:
        WeightError: For a tensor that cannot be written to, with its name.
    """

    def __init__(
        self, tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], *, partial: bool = False
    ) -> None:
        self._native = _native.Destination(_iterator(tensors), partial)


class RolloutEngine(_Engine):
    """The end that receives: made by :func:`form_group`.

    Attributes:
        rank: This rank's number.
        peers: All ranks, as they were when the group was formed.
        control: The control plane; ``None`` within one process.
    """

    _last: weakref.ref[ReceivedWeights] | None = None

    @property
    def version(self) -> int | None:
        """The last version that is complete here."""
        return self._native.version

    def receive_weights(
        self,
        version: int | None = None,
        *,
        framework: str | None = None,
        copy: bool = False,
        partial: bool = False,
    ) -> ReceivedWeights:
        """Waits for the next update; returns its weights as they come.

        Args:
            version: The version that it has to be; any unless set.
            framework: ``"torch"`` or ``"numpy"`` for tensors of these, over the same memory; :class:`Tensor`
                unless set, which ``torch.from_dlpack``, ``numpy.from_dlpack`` and others take.
            copy: Whether each tensor gets memory of its own, of the host, so that it may be kept.
            partial: Whether it may have other names than the version before.

        Raises:
            TimeoutError: If no update begins within ``timeout_seconds``; call again to go on waiting.
            TrainerLeft: If the trainer left in order.
            PeerLost: If it is gone otherwise.
            MismatchError: If the update has another version.
            StateError: If tensors of an earlier update are still used.
        """
        convert = _conversion(framework)
        receiving = self._begin(version, copy, partial, framework == "torch")
        try:
            block(receiving.wait_begun)
        except BaseException:
            settle(receiving)
            raise
        return self._received(receiving, convert)

    async def receive_weights_async(
        self,
        version: int | None = None,
        *,
        framework: str | None = None,
        copy: bool = False,
        partial: bool = False,
    ) -> ReceivedWeights:
        """As :meth:`receive_weights`, for an event loop."""
        convert = _conversion(framework)
        receiving = self._begin(version, copy, partial, framework == "torch")
        try:
            await until(receiving.when_begun)
        except BaseException:
            settle(receiving)
            raise
        return self._received(receiving, convert)

    def receive_into(
        self, destination: Destination, version: int | None = None
    ) -> ReceiveReport:
        """Waits for the next update, and copies all of it into tensors of the program's own.

        A bucket is copied at once: on a GPU by one launch, on the CPU by all threads of the engine. Until this
        returns, only the engine may read or write the tensors. An error or Ctrl-C leaves
        a mixture of two versions in them, which the next successful update replaces.

        Args:
            destination: The tensors, made once.
            version: The version that it has to be; any unless set.

        Returns:
            What was received; the version is active on all ranks.

        Raises:
            MismatchError: If a weight has no tensor of its name, dtype and shape, or a tensor got no weight; on every
                rank, and the version is active nowhere. Also if the update has another version.
            StateError: If tensors of an earlier update are still used, or `destination` is in use by another call.
            TimeoutError: If no update begins within ``timeout_seconds``; call again to go on waiting.
            TrainerLeft: If the trainer left in order.
            PeerLost: If it is gone otherwise.
        """
        self._let_go()
        return _receive_report(run(self._native.receive_into(destination._native, version)))

    async def receive_into_async(
        self, destination: Destination, version: int | None = None
    ) -> ReceiveReport:
        """As :meth:`receive_into`, for an event loop."""
        self._let_go()
        job = self._native.receive_into(destination._native, version)
        return _receive_report(await run_async(job))

    def _received(
        self, receiving: Any, convert: Callable[[Any], Any] | None
    ) -> ReceivedWeights:
        if receiving.version is None:
            receiving.result()
        received = ReceivedWeights(receiving, convert)
        self._last = weakref.ref(received)
        return received

    def _begin(self, version: int | None, copy: bool, partial: bool, torch: bool) -> Any:
        """Begins to receive."""
        self._let_go()
        return self._native.receive(version, copy, partial, torch)

    def _let_go(self) -> None:
        """Gives up what was received before and not to its end; raises where its tensors are still used."""
        last = self._last() if self._last is not None else None
        if last is not None and last.report is None:
            last._receiving.fail("the rollout begins to receive another update")
            last._receiving.wait_done(SETTLE)
        if self.control is not None and self._native.held:
            # The traceback of an update that failed keeps tensors, often in a cycle.
            gc.collect()
            if held := self._native.held:
                raise StateError(
                    f"{held} tensors of an earlier update are still used, and their buckets cannot be filled "
                    "again: copy what has to stay (copy=True), and drop the others, exceptions that have them "
                    "in their tracebacks included",
                    operation="receiving weights",
                )

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finalize()

    async def __aenter__(self) -> RolloutEngine:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.finalize_async()


class PlacedRollout(_Engine):
    """The end that lends its tensors: made by :func:`form_group` with ``lend``. Trainers write updates straight into them.

    Attributes:
        rank: This rank's number.
        peers: All ranks, as they were when the group was formed.
        control: The control plane.
    """

    @property
    def version(self) -> int | None:
        """The version that the tensors hold; ``None`` if they hold no usable one, and while a call of :meth:`update` goes on."""
        return self._native.version

    @property
    def state(self) -> str:
        """``"active"``: the tensors hold a whole version. ``"empty"``: no update has written to them yet. ``"updating"``: a call of
        :meth:`update` goes on, or one has failed and the next one has to succeed before they are used."""
        return self._native.state

    def update(self, version: int | None = None) -> ReceiveReport:
        """Takes part in the next update. Until this returns, only trainers may read or write the tensors.

        On a GPU this waits first for the work that this thread has given torch's current stream: it may read the tensors.

        Args:
            version: The version that it has to be; any unless set.

        Returns:
            What was written; the version is active on all ranks, and every byte was verified where it is.

        Raises:
            TimeoutError: If no update begins within ``timeout_seconds``; call again to go on waiting. The tensors are as before.
            StateError: If the memory of a tensor was freed or moved, with its name.
            MismatchError: If a tensor's dtype or shape is not that of the trainers, or the update has another version. The tensors are
                as before.
            WeightError: If nobody holds some part of a tensor. The tensors are as before.
            PeerLost: If a rank is gone.
            Error: The first failure of any rank. :attr:`state` says what the tensors hold.
        """
        return _receive_report(run(self._native.update(version)))

    async def update_async(self, version: int | None = None) -> ReceiveReport:
        """As :meth:`update`, for an event loop."""
        return _receive_report(await run_async(self._native.update(version)))

    def __enter__(self) -> PlacedRollout:
        return self

    def __exit__(self, *exc: object) -> None:
        self.finalize()

    async def __aenter__(self) -> PlacedRollout:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.finalize_async()


def _conversion(framework: str | None) -> Callable[[Any], Any] | None:
    if framework not in _CONVERSIONS:
        raise ValueError(f"framework is 'torch', 'numpy' or None, not {framework!r}")
    return _CONVERSIONS[framework]


def _formed(
    control: ControlPlane, formed: tuple[Any, str], lend: Any
) -> TrainerEngine | RolloutEngine | PlacedRollout:
    native, peers = formed
    kind: Any = TrainerEngine
    if control.role != "trainer":
        kind = RolloutEngine if lend is None else PlacedRollout
    return kind(native, control, control.rank, _peers(peers))


def _lent(lend: Any) -> Any:
    return None if lend is None else _native.Lent(_iterator(lend))


def form_group(
    control: ControlPlane,
    config: Config = None,
    *,
    world_size: int | None = None,
    attributes: Any = None,
    timeout: float = 60.0,
    lend: Iterable[tuple[str, Any]] | Mapping[str, Any] | None = None,
) -> TrainerEngine | RolloutEngine | PlacedRollout:
    """Prepares an engine, exchanges what all ranks say, and joins: what every rank does once.

    Args:
        control: This rank's control plane; its role says which engine this is.
        config: The ``checkpoint_engine`` section: a mapping, or the path of a YAML, TOML or JSON file, which may
            be verl's whole document. ``{"backend": "ipc"}`` is for processes of one host.
        world_size: How many ranks the group has: trainers and rollouts. The leading trainer has to
            say it; others need not know.
        attributes: What the program tells the other ranks of this one: anything that JSON has.
        timeout: How many seconds to wait for the others.
        lend: On a rollout of placed updates, the tensors that trainers write straight into: pairs of a checkpoint's name and a
            contiguous tensor, or a mapping of them. All of them are on the configuration's ``device``. With ``ipc`` trainers write straight to
            shared memory (``tensor.share_memory_()``), and to memory of a GPU that the driver exports. What is elsewhere goes through
            staging memory, which the report's ``slower`` says. A ``DTensor`` and a :class:`Box` are a part of the full tensor of this name,
            an :class:`Fp8` is quantised. The tensors are kept
            until the engine is finalized and no trainer has them open.

    Returns:
        A :class:`TrainerEngine`, a :class:`RolloutEngine`, or a :class:`PlacedRollout` if it lends its tensors.

    Raises:
        ConfigError: For a configuration that cannot be used.
        BackendError: For a backend that does not exist or does not run here.
        TimeoutError: Naming the ranks that are missing.
        MismatchError: If two ranks do not fit together.
        WeightError: For a tensor that cannot be lent, with its name.
    """
    job = _native.Engine.form(
        control._native, *_config(config), world_size, json.dumps(attributes), timeout, _lent(lend)
    )
    return _formed(control, run(job), lend)


async def form_group_async(
    control: ControlPlane,
    config: Config = None,
    *,
    world_size: int | None = None,
    attributes: Any = None,
    timeout: float = 60.0,
    lend: Iterable[tuple[str, Any]] | Mapping[str, Any] | None = None,
) -> TrainerEngine | RolloutEngine | PlacedRollout:
    """As :func:`form_group`, for an event loop."""
    job = _native.Engine.form(
        control._native, *_config(config), world_size, json.dumps(attributes), timeout, _lent(lend)
    )
    return _formed(control, await run_async(job), lend)


def leave(engine: TrainerEngine | RolloutEngine | None, control: ControlPlane | None) -> None:
    """Ends this process's part in its group, and ignores errors: both ends are closed in any case."""
    for end in (engine and engine.finalize, control and control.close):
        try:
            if end is not None:
                end()
        except Error:
            _LOGGER.debug("leaving a group", exc_info=True)


def form_local_group(
    config: Config = None, *, rollouts: int = 1
) -> tuple[TrainerEngine, list[RolloutEngine]]:
    """A trainer and its rollouts within this process, over the backend ``naive``, for tests and trials.

    The two ends have to run at the same time: in two threads, or as two tasks.
    """
    trainer, others = run(_native.Engine.form_local(*_config(config), rollouts))
    engines = [RolloutEngine(native, None, rank, ()) for rank, native in enumerate(others, 1)]
    return TrainerEngine(trainer, None, 0, ()), engines
