"""The engine as a backend of verl (0.9.1)::

    actor_rollout_ref:
      rollout:
        checkpoint_engine:
          backend: ckpt_engine
          custom_backend_module: ckpt_engine.verl
          update_weights_bucket_megabytes: 512
          engine_kwargs:
            ckpt_engine:
              transport: ipc
              trainer_quantize_fp8: true

Keys of ``engine_kwargs.ckpt_engine``: ``transport`` (the backend of this engine that carries the weights: ``ipc``
unless set), ``gather`` (whether verl gathers whole weights, which the actor of rank 0 sends; yes unless set), ``address``
(the trainer's interface that rollouts reach, without a port; the one of the host's name unless set), ``heartbeat_timeout``,
``copy`` (whether each tensor that a rollout gets has memory of its
own; no unless set), and all keys of this engine's configuration: ``timeout_seconds``, ``digests``, ``device``,
``quantization``, ``engine_kwargs``, …

``gather: false`` has every actor send the shards that it holds, and rollouts lend memory for a whole model that these are
written to. It needs verl's shards instead of its whole weights, which :class:`ShardManager` asks for::

    actor_rollout_ref:
      rollout:
        checkpoint_manager_class: ckpt_engine.verl.ShardManager
        checkpoint_engine:
          …
          engine_kwargs:
            ckpt_engine: {transport: ipc, gather: false}

verl prepares, builds the topology and finalizes around every update. The group is formed in the first one and kept:
as long as all ranks say that they are in it, what follows costs a comparison. It is formed anew when workers are
others than before, or when an update has failed with an error that says so.
"""

from __future__ import annotations

from typing import Any, AsyncIterator

from verl.checkpoint_engine import (
    CheckpointEngine,
    CheckpointEngineManager,
    CheckpointEngineRegistry,
)

from ._shards import ShardWorker
from ._worker import Worker, drain, group_of
from .errors import ConfigError, Error

#: The name in verl's registry.
BACKEND = "ckpt_engine"


@CheckpointEngineRegistry.register(BACKEND)
class CkptEngine(CheckpointEngine):
    """verl's end of an engine: the sender on the actor of rank 0, a receiver on every rollout worker.

    The other actors take part in the collectives of the generator, by draining it, and send nothing. With ``gather: false`` every actor sends
    the shards that it holds.

    Args:
        bucket_size: Bytes of a bucket, as verl counts them.
        is_master: Whether this is the actor of rank 0.
        **kwargs: ``engine_kwargs.ckpt_engine``; see the module.

    Raises:
        ConfigError: For a key that is not known, or a value that cannot be used.
    """

    wire_format = "named_tensors"

    def __init__(self, bucket_size: int, is_master: bool = False, **kwargs: Any) -> None:
        self.is_master = is_master
        self._copy = bool(kwargs.pop("copy", False))
        gather = kwargs.pop("gather", True)
        if not isinstance(gather, bool):
            raise ConfigError(f"`gather` is true or false, not {gather!r}")
        self._worker = Worker(bucket_size, kwargs) if gather else ShardWorker(bucket_size, kwargs)
        self._steps = 0

    def prepare(self) -> dict[str, Any]:
        """What the driver has to know of this worker: whether it is in a group, and how to reach the trainer.

        Returns:
            Picklable metadata. The master's has the group's secret; it travels as verl's own does.
        """
        return {
            **self._worker.prepare(self.is_master),
            "is_master": self.is_master,
            "gather": not isinstance(self._worker, ShardWorker),
        }

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Says of each worker whether the group it is in is still the one, and how to form it where not.

        Args:
            actor_wg_world_size: How many actors there are; their metadata come first.
            rollout_world_size: How many rollout workers there are.
            metadata: What each worker's :meth:`prepare` returned.

        Returns:
            The arguments of :meth:`init_process_group`, one list item for each actor, and for each rollout worker.
        """
        if len(metadata) != actor_wg_world_size + rollout_world_size:
            raise ValueError(
                f"{len(metadata)} workers said something, of {actor_wg_world_size} actors and "
                f"{rollout_world_size} rollout workers"
            )
        actors, rollouts = metadata[:actor_wg_world_size], metadata[actor_wg_world_size:]
        masters = [worker for worker in actors if worker["is_master"]]
        if len(masters) != 1:
            raise ValueError(f"one actor is the master, not {len(masters)}")
        master = masters[0]
        gather = master["gather"]
        others = [i for i, worker in enumerate(metadata) if worker["gather"] != gather]
        if others:
            kind = "actor" if others[0] < actor_wg_world_size else "rollout worker"
            raise ValueError(
                f"`gather` is {gather} on the master, and is not on another {kind}: all workers have the same engine_kwargs"
            )
        # Who sends: the actor that leads, which is rank 0, and without gathering all actors.
        senders = [master] if gather else [master, *(worker for worker in actors if worker is not master)]
        group = group_of(master, [*senders[1:], *rollouts])
        ranks = {worker["worker"]: rank for rank, worker in enumerate([*senders, *rollouts])}

        def arguments(workers: list[dict[str, Any]], role: str) -> dict[str, list[Any]]:
            own = [ranks.get(worker["worker"]) for worker in workers]
            return {
                "group": [None if rank is None else group for rank in own],
                "leader": [master] * len(workers),
                "world_size": [len(ranks)] * len(workers),
                "role": [role] * len(workers),
                # Rank 0 waits for what the ranks of trainers say; rollouts alone may have any.
                "rank": [None] * len(workers) if gather else own,
                "trainers": [len(senders)] * len(workers),
            }

        return arguments(actors, "trainer"), arguments(rollouts, "rollout")

    def init_process_group(
        self,
        group: str | None,
        leader: dict[str, Any],
        world_size: int,
        role: str,
        rank: int | None,
        trainers: int,
    ) -> None:
        """Joins the group, unless this worker is in it already.

        Raises:
            TimeoutError: Naming the ranks that are missing.
            Error: What :func:`ckpt_engine.form_group` raises.
        """
        self._worker.connect(group, leader, world_size, role=role, rank=rank, trainers=trainers)

    def finalize(self) -> None:
        """Nothing, after every update: the group and its buckets stay for the next one."""

    def close(self) -> None:
        """Leaves the group, frees the buckets and ends the connections."""
        self._worker.close()

    async def send_weights(
        self, weights: Any, global_steps: int | None = None
    ) -> dict[str, float] | None:
        """Sends the weights to all rollout workers; on the other actors, drains the generator.

        Args:
            weights: verl's generator of ``(name, tensor)``. It runs on this thread, as verl's engines have it: its
                items are collectives of all actors, so that it is drained to its end also where an update
                fails. With ``gather: false`` verl's training engine, whose shards are sent, or a mapping of names and tensors,
                each of them whole or a ``DTensor``.
            global_steps: The version; one more than the last unless set.

        Returns:
            The update's metrics on the master, ``None`` on the others.
        """
        if not isinstance(self._worker, ShardWorker):
            if hasattr(weights, "get_per_tensor_param"):
                weights, _ = weights.get_per_tensor_param()
            if not self.is_master:
                await drain(weights)
                return None
        self._steps = self._steps + 1 if global_steps is None else int(global_steps)
        report = await self._worker.send(weights, self._steps)
        return report.metrics() if self.is_master else None

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, Any]]:
        """The weights as they come, as tensors of torch over the bucket that they came in.

        They are valid until the next one is asked for: copy what has to stay, or set ``copy``. The version is
        active when the generator has ended; leaving it earlier aborts the update on every rank.

        With ``gather: false`` they are in the memory that this worker lends, valid until the next update, and the version is complete before
        the first of them comes: do not write to them.

        Args:
            global_steps: The version that it has to be; any unless set.
        """
        if isinstance(self._worker, ShardWorker):
            for name, tensor in (await self._worker.update(global_steps)).items():
                yield name, tensor.clone() if self._copy else tensor
            return
        try:
            received = await self._worker.receive(global_steps, self._copy)
            async with received:
                async for item in received:
                    yield item
                    del item
        except Error as error:
            self._worker.failed(error)
            raise


class ShardManager(CheckpointEngineManager):
    """verl's manager, for ``gather: false``: actors give the backend their training engine, which has the shards, and not whole weights.

    It is verl's ``checkpoint_manager_class``. With ``gather: true`` the backend asks the engine for whole weights, as verl does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.backend == BACKEND:
            # What verl's actors are told as the `mode` of an update. For verl's own backend of this name they give the engine.
            self.backend = "delta_sharded"
