"""The engine as a transport of NeMo-RL's refit (``nemo_rl.utils.checkpoint_engines``)::

    policy:
      generation:
        refit_transport: "ckpt_engine.nemo_rl:CkptEngine"
        refit_cfg:
          "ckpt_engine.nemo_rl:CkptEngine":
            transport: nccl
            device: cuda:0

Keys: ``transport`` (the backend of this engine that carries the weights: ``ipc`` unless set), ``address`` (the interface by
which other workers reach this host, without a port; the host's name unless set), ``heartbeat_timeout``, ``copy`` (whether
each tensor that a rollout gets has memory of its own; no unless set), and all keys of this engine's configuration.

The policy worker of rank 0 sends to all rollout workers. The other policy workers take part in the collectives of the
generator, by draining it. The group is formed in the first refit and kept.
"""

from __future__ import annotations

from typing import Any, AsyncIterator

from nemo_rl.utils.checkpoint_engines.base import CheckpointEngine

from ._worker import Worker, drain, group_of
from .errors import Error


class CkptEngine(CheckpointEngine):
    """NeMo-RL's end of an engine, in each of its workers.

    Args:
        bucket_size: Bytes of a bucket.
        **kwargs: ``refit_cfg`` of this class; see the module.

    Raises:
        ConfigError: For a key that is not known, or a value that cannot be used.
    """

    def __init__(self, bucket_size: int, **kwargs: Any) -> None:
        self._copy = bool(kwargs.pop("copy", False))
        self._worker = Worker(bucket_size, kwargs)
        # Which worker this is, is said after `prepare`, where all of them could still lead.
        self._sends: bool | None = None
        self._versions = 0

    def prepare(self) -> dict[str, Any]:
        """What all workers have to know of this one; it is picklable, and may have a group's secret in it."""
        return self._worker.prepare(may_lead=self._sends is not False)

    def _connect(
        self, sends: bool, part: bool, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None:
        if len(metadata) != train_world_size + rollout_world_size:
            raise ValueError(
                f"{len(metadata)} workers said something, of {train_world_size} policy workers and "
                f"{rollout_world_size} rollout workers"
            )
        self._sends = sends
        leader = metadata[0]
        group = group_of(leader, metadata[train_world_size:]) if part else None
        self._worker.connect(group, leader, 1 + rollout_world_size)

    def init_policy_process_group(
        self, *, worker_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None:
        """Forms the group, on the policy worker of rank 0.

        Args:
            worker_rank: This policy worker's number.
            train_world_size: How many policy workers there are; their metadata come first.
            rollout_world_size: How many rollout workers there are.
            metadata: What each worker's :meth:`prepare` returned.

        Raises:
            TimeoutError: Naming the ranks that are missing.
            Error: What :func:`ckpt_engine.form_group` raises.
        """
        first = worker_rank == 0
        self._connect(first, first, train_world_size, rollout_world_size, metadata)

    def init_rollout_process_group(
        self, *, rollout_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None:
        """Joins the group; the arguments are those of :meth:`init_policy_process_group`."""
        self._connect(False, True, train_world_size, rollout_world_size, metadata)

    def finalize(self) -> None:
        """Nothing, after every refit: the group and its buckets stay for the next one."""

    def close(self) -> None:
        """Leaves the group, frees the buckets and ends the connections."""
        self._worker.close()

    async def send_weights(self, weights: Any) -> None:
        """Sends the weights to all rollout workers; on the other policy workers, drains the generator."""
        if not self._sends:
            await drain(weights)
            return
        self._versions += 1
        await self._worker.send(weights, self._versions)

    async def receive_weight_batches(self) -> AsyncIterator[list[tuple[str, Any]]]:
        """The weights as they come, in lists of those that came in one bucket, as tensors of torch over it.

        A list is valid until the next one is asked for: copy what has to stay, or set ``copy``. The version is active when
        the generator has ended; leaving it earlier aborts the update on every rank.
        """
        try:
            received = await self._worker.receive(None, self._copy)
            async with received:
                async for batch in received.buckets_async():
                    yield batch
                    del batch
        except Error as error:
            self._worker.failed(error)
            raise
