"""Updates without gathering: each trainer streams the parts that it holds, and rollouts lend tensors for them.

Nobody knows the names of the weights before the first update: frameworks give them with the weights. So ranks only connect beforehand. In the
first update every trainer tells rank 0 what it has, rank 0 tells the rollouts what to lend, and then all form the group. An update with other
names, types or shapes is refused, and the group is formed anew before the next one.
"""

from __future__ import annotations

import copy as copies
import fcntl
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import _native
from ._worker import Worker
from .engine import Channel, ControlPlane, PlacedRollout, TrainerEngine, form_group_async, leave
from .errors import (
    AbortedError,
    ConfigError,
    Error,
    MismatchError,
    StateError,
    TimeoutError,
    WeightError,
)
from .reports import SendReport

#: The transports that write into tensors that are lent.
TRANSPORTS = ("ipc", "nixl", "nccl")

#: Tensors begin at multiples of it, as allocators have them.
ALIGNMENT = 256

WHAT = "sending shards"


class Held(NamedTuple):
    """What a trainer has of a weight."""

    name: str
    #: As torch calls it, without `torch.`.
    dtype: str
    #: Of the whole weight.
    shape: tuple[int, ...]
    #: The whole weight, or this rank's part of it: a `DTensor` or a :class:`ckpt_engine.Box`.
    tensor: Any


class Lend(NamedTuple):
    """A weight that rollouts lend tensors for; where it is quantised, with the name and the shape of its scales."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scales: tuple[str, tuple[int, ...]] | None


class ShardWorker(Worker):
    """One worker of a group in which all trainers send, each what it holds.

    Args:
        bucket_size: Bytes of a bucket.
        options: As :class:`Worker`.

    Raises:
        ConfigError: For a transport that cannot write into tensors that are lent, and for options that placed updates do not have.
    """

    def __init__(self, bucket_size: int, options: dict[str, Any]) -> None:
        super().__init__(bucket_size, options)
        transport = self._config["backend"]
        if transport not in TRANSPORTS:
            *others, last = (f"`{name}`" for name in TRANSPORTS)
            raise _refusal(
                f"`{transport}` cannot write parts of weights into tensors that a rollout lends: the transports that can are "
                f"{', '.join(others)} and {last}"
            )
        if self._config.get("delta"):
            raise _refusal("`delta` sends whole weights")
        if (self._config.get("quantization") or {}).get("quantize_on_receive"):
            raise _refusal("a rollout that lends its tensors cannot quantise: use `trainer_quantize_fp8`")
        self._timeout = float(self._config.get("timeout_seconds") or 60)
        # Rank 0 decides by these what is quantised. Trainers hear it from the rollouts, by what they lend.
        self._rules = json.dumps(self._config)
        self._config = copies.deepcopy(self._config)
        self._config.pop("trainer_quantize_fp8", None)
        of_backends = self._config.get("engine_kwargs") or {}
        self._config["engine_kwargs"] = {
            **of_backends,
            transport: {**(of_backends.get(transport) or {}), "placed": True},
        }
        self._trainers = self._world_size = 0
        # Of a trainer: the dtypes and shapes of its weights. Of a rollout: the tensors that it lends.
        self._known: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._lent: dict[str, Any] = {}

    def _form(self, world_size: int, trainers: int) -> None:
        """Nothing but the connection: the group is formed in the first update."""
        self._world_size, self._trainers = world_size, trainers
        self._known, self._lent = {}, {}

    async def send(self, weights: Any, version: int) -> SendReport:
        """Sends what this trainer holds.

        Args:
            weights: verl's training engine; or a mapping or a list of names and tensors, each of them whole or a ``DTensor``.
            version: The version.

        Raises:
            WeightError: For a weight that is neither whole nor a part that its placements describe, with its name.
            MismatchError: If its weights are others than in the update before; the next update takes them.
            Error: As :meth:`TrainerEngine.send_weights`.
        """
        control = self._connected(WHAT)
        shards: list[Held] = []
        failure: Exception | None = None
        try:
            shards = list(_held(weights))
        except Exception as error:
            failure = error
        try:
            engine = self._engine
            if engine is None:
                engine = await self._formed(control, self._agreed(control, shards, failure))
            elif failure is None:
                failure = self._other_weights(shards)
            assert isinstance(engine, TrainerEngine)
            return await engine.send_weights_async(_stream(shards, failure), version)
        except Error as error:
            self._failed(control, error, failure)
            if isinstance(failure, Error):
                raise failure from None
            raise

    async def update(self, version: int | None) -> dict[str, Any]:
        """Has the next version written, and returns its tensors by name. They are valid until the next call."""
        control = self._connected("receiving weights")
        try:
            engine = self._engine
            if engine is None:
                engine = await self._formed(control, self._told(control))
            assert isinstance(engine, PlacedRollout)
            await engine.update_async(version)
            return self._lent
        except Error as error:
            self._failed(control, error)
            raise

    def _failed(self, control: ControlPlane, *errors: Exception | None) -> None:
        """As :meth:`failed`, unless this worker is in another group by now."""
        for error in errors:
            if self._control is control and isinstance(error, Error):
                self.failed(error)

    def _connected(self, what: str) -> ControlPlane:
        if self._control is None:
            raise StateError("this worker has not joined a group", operation=what)
        return self._control

    async def _formed(self, control: ControlPlane, agreement: Any) -> Any:
        """Forms the group when the ranks agree on the weights. If that fails, this rank leaves: no other waits for it."""
        try:
            lend = await agreement
            engine = await form_group_async(
                control, self._config, world_size=self._world_size, timeout=self._timeout, lend=lend
            )
        except BaseException:
            if self._control is control:
                self._control, self.group = None, None
            leave(None, control)
            raise
        if self._control is not control:
            leave(engine, control)
            raise StateError("this worker joined another group meanwhile", operation="forming the group")
        self._engine = engine
        return engine

    async def _agreed(
        self, control: ControlPlane, shards: list[Held], failure: Exception | None
    ) -> None:
        """A trainer's part in the agreement: it says what it has, and hears that no rank has failed."""
        own: dict[str, Any] = {"weights": [held[:3] for held in shards]}
        await self._round(control, range(self._trainers), own, failure)
        await self._round(control, range(self._trainers, self._world_size))
        self._known = {held.name: held[1:3] for held in shards}

    async def _told(self, control: ControlPlane) -> list[tuple[str, Any]]:
        """A rollout's part in the agreement: it hears what the trainers have, and makes the tensors that it lends."""
        answer = await self._round(control, range(self._trainers))
        weights = [Lend(*weight) for weight in answer["weights"]]
        failure: Exception | None = None
        lend: list[tuple[str, Any]] = []
        try:
            self._lent, lend = allocate(weights, str(self._config.get("device") or "cpu"))
        except Exception as error:
            failure = error
        await self._round(control, range(self._trainers, self._world_size), {}, failure)
        return lend

    async def _round(
        self,
        control: ControlPlane,
        speakers: range,
        own: dict[str, Any] | None = None,
        failure: Exception | None = None,
    ) -> dict[str, Any]:
        """Some ranks say something to rank 0, and all ranks hear its answer: the weights, if trainers have spoken.

        Raises:
            Exception: This rank's `failure`, once all ranks have heard of it.
            AbortedError: If another rank has failed: `rank` says which.
        """
        channel = control.channel()
        if failure is not None:
            own = {"failed": f"{type(failure).__name__}: {failure}"}
        if control.rank == 0:
            answer = await self._answered(channel, speakers, own)
        else:
            if own is not None:
                channel.send(0, json.dumps(own).encode())
            _, answer = await self._message(channel, [0])
        if failure is not None:
            raise failure
        if "failed" in answer:
            raise AbortedError(
                answer["failed"], operation="agreeing on the weights", rank=answer["rank"], recovery="Reconnect"
            )
        return answer

    async def _answered(
        self, channel: Channel, speakers: range, own: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What ranks say, as one answer, which all ranks hear."""
        said = {} if own is None else {0: own}
        while missing := [rank for rank in speakers if rank not in said]:
            rank, one = await self._message(channel, missing)
            said[rank] = one
        answer: dict[str, Any] = {}
        failure: Error | None = None
        failed = [rank for rank in sorted(said) if "failed" in said[rank]]
        if failed:
            answer = {**said[failed[0]], "rank": failed[0]}
        elif own is not None:
            try:
                answer = {"weights": self._union({rank: said[rank]["weights"] for rank in sorted(said)})}
            except Error as error:
                failure, answer = error, {"failed": f"{type(error).__name__}: {error}", "rank": 0}
        body = json.dumps(answer).encode()
        for rank in range(1, self._world_size):
            channel.send(rank, body)
        if failure is not None:
            raise failure
        return answer

    async def _message(self, channel: Channel, ranks: list[int]) -> tuple[int, Any]:
        """The next message, of one of these ranks."""
        message = await channel.recv_async(self._timeout)
        if message is None:
            raise TimeoutError(
                f"nothing came of rank {', '.join(map(str, ranks))} within {self._timeout:.0f} s",
                operation="agreeing on the weights",
                rank=ranks[0],
                recovery="Reconnect",
            )
        return message[0], json.loads(message[1])

    def _union(self, said: dict[int, list[Any]]) -> list[Lend]:
        """Every weight that a trainer has, and which of them are quantised."""
        weights: dict[str, tuple[int, str, list[int]]] = {}
        for rank, held in said.items():
            for name, dtype, shape in held:
                first, *kind = weights.setdefault(name, (rank, dtype, list(shape)))
                if kind != [dtype, list(shape)]:
                    raise MismatchError(
                        f"rank {first} has it as {kind[0]} of {kind[1]}, and rank {rank} as {dtype} of {list(shape)}",
                        operation=WHAT,
                        rank=rank,
                        tensor=name,
                        recovery="Reconnect",
                    )
        named = [(name, dtype, shape) for name, (_, dtype, shape) in weights.items()]
        scales = {name: (scale, tuple(shape)) for name, scale, shape in _native.quantized(self._rules, named)}
        return [Lend(name, dtype, tuple(shape), scales.get(name)) for name, dtype, shape in named]

    def _other_weights(self, shards: list[Held]) -> MismatchError | None:
        """An error if the weights are others than those that rollouts have lent tensors for."""
        now = {held.name: held[1:3] for held in shards}
        names = [name for name in {**self._known, **now} if self._known.get(name) != now.get(name)]
        if not names:
            return None
        return MismatchError(
            f"{len(names)} weights of this trainer have another name, type or shape than in the update before, or are missing: the next "
            "update takes them as they are then",
            operation=WHAT,
            tensor=names[0],
            recovery="Reconnect",
        )


def _refusal(why: str) -> ConfigError:
    return ConfigError(f"`gather: false`: {why}", operation="reading engine_kwargs")


def _stream(shards: list[Held], failure: Exception | None) -> Iterator[tuple[str, Any]]:
    if failure is not None:
        raise failure
    for held in shards:
        yield held.name, held.tensor


def _held(weights: Any) -> Iterator[Held]:
    """What this rank holds, of whatever gives it."""
    if hasattr(weights, "get_per_tensor_param_shard"):
        yield from _of_engine(weights)
        return
    pairs: Any = weights.items() if isinstance(weights, Mapping) else weights
    if hasattr(pairs, "__aiter__") or iter(pairs) is pairs:
        raise ConfigError(
            f"`gather: false` takes verl's training engine, or named tensors that exist already, and got a {type(weights).__name__}: verl's "
            "gather as they are read. Set `checkpoint_manager_class: ckpt_engine.verl.ShardManager`, beside the checkpoint_engine "
            "section",
            operation=WHAT,
        )
    for name, tensor in pairs:
        yield _described(name, tensor)


def _described(name: str, tensor: Any) -> Held:
    """A tensor that is whole, or a part by its placements."""
    import torch
    from torch.distributed.tensor import DTensor

    whole = (torch.Tensor, torch.nn.Parameter, torch.nn.parameter.Buffer)
    if not isinstance(tensor, DTensor) and type(tensor) not in whole:
        raise WeightError(
            f"it is neither a whole tensor nor a DTensor, but a {type(tensor).__name__}: leave `gather` at true",
            operation=WHAT,
            tensor=name,
        )
    return Held(name, _name(tensor.dtype), tuple(tensor.shape), tensor.detach())


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _of_engine(engine: Any) -> Iterator[Held]:
    """The shards of verl's training engine, under the names and in the shapes of its whole weights."""
    if getattr(engine, "_qat_enabled", False):
        raise _refusal("verl quantises the whole weights of a model that is trained with QAT")
    shards, _ = engine.get_per_tensor_param_shard()
    # As verl's own whole weights: it leaves the experts of this model stacked.
    model = getattr(getattr(engine, "model_config", None), "hf_config", None)
    stacked = getattr(model, "model_type", None) == "gpt_oss"
    try:
        for name, local, spec in shards:
            yield from _of_spec(name, local, spec, stacked)
    finally:
        # Other ranks' shards may be collectives of all.
        for _ in shards:
            pass


def _of_spec(name: str, local: Any, spec: Any, stacked: bool) -> Iterator[Held]:
    """One shard of verl: the elements, flat, and how they lie in the whole."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    def refuse(why: str) -> WeightError:
        return WeightError(f"{why}: leave `gather` at true", operation=WHAT, tensor=name)

    if any(getattr(spec, key, None) is not None for key in ("place", "to_hf_chunk", "hf_slots")):
        raise refuse("verl converts it to weights of the checkpoint when it is whole")
    if ".lora_" in name or ".base_layer." in name:
        raise refuse("it belongs to an adapter, or has one that is not merged")
    shape = tuple(int(side) for side in spec.full_shape)
    extent, offset = shape, (0,) * len(shape)
    if spec.mesh is not None:
        placements = tuple(spec.placements)
        if not all(type(placement) in (Shard, Replicate) for placement in placements):
            words = ", ".join(map(str, placements))
            raise refuse(f"no box describes what this rank has of it, by its placements ({words})")
        extent, offset = compute_local_shape_and_global_offset(shape, spec.mesh, placements)
    if math.prod(extent) != local.numel():
        raise refuse(f"this rank has {local.numel()} elements of it, and by its placements {tuple(extent)}")
    local = local.detach().reshape(extent)
    if len(shape) == 3 and not stacked and name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
        yield from _experts(name, local, shape, offset)
        return
    whole = tuple(extent) == shape
    yield Held(name, _name(local.dtype), shape, local if whole else _native.Box(local, shape, offset))


def _experts(name: str, local: Any, shape: tuple[int, ...], offset: Any) -> Iterator[Held]:
    """Of a stack of experts the matrices of the checkpoint, as verl's whole weights have them."""
    base, fused = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    matrix = (shape[1] // len(parts), shape[2])
    first, top, left = offset
    for i, expert in enumerate(local):
        for k, part in enumerate(parts):
            start, end = (min(max(k * matrix[0] - top, 0), len(expert)) for k in (k, k + 1))
            rows = expert[start:end]
            if rows.numel():
                box = _native.Box(rows, matrix, (top + start - k * matrix[0], left))
                yield Held(f"{base}.{first + i}.{part}.weight", _name(local.dtype), matrix, box)


def allocate(weights: list[Lend], device: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Makes tensors for weights, in one piece of memory that other processes can open.

    Returns:
        By name the tensors, scales behind their weights; and what is to be lent.
    """
    import torch

    size, places = 0, []
    for _, dtype, shape, scales in weights:
        pieces = [(dtype, shape)] if scales is None else [("float8_e4m3fn", shape), ("float32", scales[1])]
        for kind, sides in pieces:
            places.append((size, getattr(torch, kind), tuple(sides)))
            length = places[-1][1].itemsize * math.prod(sides)
            size += -(-length // ALIGNMENT) * ALIGNMENT
    if device == "cpu":
        memory = torch.frombuffer(_shared(size), dtype=torch.uint8)
    else:
        # Without a number it is the first one, as everywhere in the configuration, and not torch's current one.
        device = f"{device}:0" if ":" not in device else device
        memory = torch.empty(max(1, size), dtype=torch.uint8, device=device)
    made = (
        memory[at : at + dtype.itemsize * math.prod(shape)].view(dtype).view(shape) for at, dtype, shape in places
    )
    tensors, lend = {}, []
    for name, _, _, scales in weights:
        tensors[name] = own = next(made)
        if scales is not None:
            tensors[scales[0]] = scale = next(made)
            own = _native.Fp8(own, scale)
        lend.append((name, own))
    return tensors, lend


def _shared(size: int) -> mmap.mmap:
    """Memory of the host that trainers map too: they do so only if nobody can make it shorter."""
    size = max(1, size)
    file = os.memfd_create("ckpt-engine-lent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # All of it now: where memory is short, not within an update.
        os.posix_fallocate(file, 0, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return mmap.mmap(file, size)
    finally:
        os.close(file)
