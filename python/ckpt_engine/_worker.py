"""A worker of a framework that prepares, connects and finalizes around every update: verl, NeMo-RL.

The group is formed in the first update and kept: as long as all ranks say that they are in it, what follows costs a
comparison. It is formed anew when workers are others than before, or when an update has failed with an error that says
so.
"""

from __future__ import annotations

import socket
import uuid
from typing import Any

from . import generate_token
from .engine import (
    ControlPlane,
    PlacedRollout,
    ReceivedWeights,
    RolloutEngine,
    TrainerEngine,
    check_config,
    form_group,
    leave,
)
from .errors import Error, StateError
from .reports import SendReport


class Worker:
    """One worker: the trainer that sends, a rollout, or another trainer, which drains its generator.

    Args:
        bucket_size: Bytes of a bucket.
        options: The framework's keywords: ``transport``, ``address``, ``heartbeat_timeout``, and all keys of the engine's
            configuration.

    Raises:
        ConfigError: For a key that is not known, or a value that cannot be used.
    """

    def __init__(self, bucket_size: int, options: dict[str, Any]) -> None:
        options = dict(options)
        self._address = str(options.pop("address", None) or socket.gethostname())
        self._heartbeat = options.pop("heartbeat_timeout", None)
        options["backend"] = options.pop("transport", None) or "ipc"
        options["update_weights_bucket_megabytes"] = max(1, bucket_size >> 20)
        self._config = options
        check_config(options)
        # This worker, to those who form the group.
        self._worker = uuid.uuid4().hex
        # The connection to the group; the secret, the place and the name of the next one, where this worker may lead it.
        self._control: ControlPlane | None = None
        self._next: tuple[ControlPlane, bytes, str] | None = None
        self._engine: TrainerEngine | RolloutEngine | PlacedRollout | None = None
        #: The group that this worker is in.
        self.group: str | None = None

    def prepare(self, may_lead: bool) -> dict[str, Any]:
        """Picklable metadata: whether this worker is in a group, and how to reach it where it may lead the next one.

        A leader's metadata has the group's secret.
        """
        metadata: dict[str, Any] = {"worker": self._worker, "group": self.group}
        if may_lead:
            # Every group has a control plane of its own: nobody of an old one can meet it.
            if self._next is None:
                token = generate_token()
                control = ControlPlane.lead(
                    f"{self._address}:0", token, heartbeat_timeout=self._heartbeat
                )
                self._next = control, token, uuid.uuid4().hex
            control, token, name = self._next
            metadata.update(address=control.address, token=token, next=name)
        return metadata

    def connect(
        self,
        group: str | None,
        leader: dict[str, Any],
        world_size: int,
        *,
        role: str = "rollout",
        rank: int | None = None,
        trainers: int = 1,
    ) -> None:
        """Joins the group, unless this worker is in it already; `None` is for one that has no part in it.

        Args:
            group: The group's name, of :func:`group_of`.
            leader: What the leader said.
            world_size: How many ranks the group has.
            role: ``"rollout"`` or ``"trainer"``, of a worker that does not lead.
            rank: The number to have; the lowest free one unless set.
            trainers: How many of the ranks are trainers.

        Raises:
            TimeoutError: Naming the ranks that are missing.
            Error: What :func:`ckpt_engine.form_group` raises.
        """
        leads = leader["worker"] == self._worker
        if not leads and self._next is not None:
            (control, *_), self._next = self._next, None
            control.close()
        if group is None or group == self.group:
            return
        self._leave()
        if leads:
            if self._next is None:
                raise StateError("prepare has not been called", operation="forming the group")
            (self._control, *_), self._next = self._next, None
        else:
            self._control = ControlPlane.join(
                leader["address"],
                leader["token"],
                role=role,
                rank=rank,
                heartbeat_timeout=self._heartbeat,
            )
        self._form(world_size, trainers)
        self.group = group

    def _form(self, world_size: int, trainers: int) -> None:
        """Forms the group of the connection."""
        self._engine = form_group(self._control, self._config, world_size=world_size)

    def _leave(self) -> None:
        """Ends this worker's part in its group; what fails in it is over all the same."""
        engine, control = self._engine, self._control
        self._engine, self.group, self._control = None, None, None
        leave(engine, control)

    def close(self) -> None:
        """Leaves the group, frees the buckets and ends the connections."""
        self._leave()
        if self._next is not None:
            (control, *_), self._next = self._next, None
            control.close()

    def failed(self, error: Error) -> None:
        """An engine that is not in order is not used again."""
        if error.recovery == "Reconnect":
            self.group = None

    async def send(self, weights: Any, version: int) -> SendReport:
        """Sends one version; the generator is drained to its end also where that fails: its items are collectives."""
        engine = self._engine
        if not isinstance(engine, TrainerEngine):
            raise StateError("this worker has not joined a group", operation="sending weights")
        try:
            return await engine.send_weights_async(weights, version)
        except Error as error:
            self.failed(error)
            await drain(weights)
            raise

    async def receive(self, version: int | None, copy: bool) -> ReceivedWeights:
        """Waits for a version; gives tensors of torch."""
        engine = self._engine
        if not isinstance(engine, RolloutEngine):
            raise StateError("this worker has not joined a group", operation="receiving weights")
        return await engine.receive_weights_async(version, framework="torch", copy=copy)


def group_of(leader: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The group that a leader and other workers are in, if it is one, or else the name of their next one.

    A pure function of what they have said, so that every worker may call it. A group's name has its members in it: it
    fits only those that formed it.
    """
    members = ",".join(worker["worker"] for worker in [leader, *others])
    group = leader["group"]
    kept = (
        group is not None
        and group.split(":")[0] == members
        and all(worker["group"] == group for worker in others)
    )
    return group if kept else f"{members}:{leader['next']}"


async def drain(weights: Any) -> None:
    """Takes part in what is left of a generator's collectives."""
    if hasattr(weights, "__aiter__"):
        async for _ in weights:
            pass
    else:
        for _ in weights:
            pass
