"""What updates did, as data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


def _seconds(duration: dict[str, int]) -> float:
    return duration["secs"] + duration["nanos"] / 1e9


@dataclass(frozen=True)
class TensorCounts:
    """The tensors of an update, by what happened to them.

    Attributes:
        tensors: Weights sent; the scales of quantised ones do not count.
        converted: Weights that were quantised.
        kept: Weights that were left as they are although quantisation is on.
        passed_through: Weights that were quantised already.
        kept_reasons: Why weights were kept: the reason, and how many.
        source_bytes: Bytes read from the trainer's memory.
        wire_bytes: Bytes of weights and scales that travelled.
    """

    tensors: int = 0
    converted: int = 0
    kept: int = 0
    passed_through: int = 0
    kept_reasons: dict[str, int] = field(default_factory=dict)
    source_bytes: int = 0
    wire_bytes: int = 0


@dataclass(frozen=True)
class StageTimes:
    """Where the time of an update went on the trainer, in seconds. Stages overlap.

    Attributes:
        source: Waiting for the program's own iterator.
        release: Waiting for rollouts to give a bucket back.
        encode: Copying or encoding weights into buckets.
        publish: Making buckets visible to rollouts.
        confirm: Waiting for the rollouts' confirmations.
    """

    source: float
    release: float
    encode: float
    publish: float
    confirm: float


@dataclass(frozen=True)
class ReceiverReport:
    """How one rollout ended an update.

    Attributes:
        rank: The rollout.
        state: Its version's state: ``"active"``, ``"ready"``, ``"staging"`` or ``"aborted"``.
        seconds: From the update's begin to the rollout's confirmation.
        digest: Of the version as far as the rollout wants it, as the rollout computed it.
        notes: What the rollout's program said.
        parts: The named parts of the version that it got. Empty if versions have no named parts.
    """

    rank: int
    state: str
    seconds: float
    digest: int | None
    notes: Any
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChangedElements:
    """Elements of one type, and how many of them changed.

    Attributes:
        compared: All of the weights that were there before.
        changed: Those that have another value.
    """

    compared: int
    changed: int


@dataclass(frozen=True)
class PartReport:
    """A named part of a version: of the policy, of a draft model, of an adapter.

    Attributes:
        digest: The number of what is in it: names, types, shapes and bytes. A part that has the same number as before is unchanged.
        tensors: Its tensors, scales included.
        bytes: Their bytes.
        sent: Those of which anything travelled, changes or all of it.
    """

    digest: int
    tensors: int
    bytes: int
    sent: int


@dataclass(frozen=True)
class DeltaReport:
    """What changed in an update that carries only changes.

    Attributes:
        whole: Why whole weights travelled; ``None`` if changes did.
        elements: What was compared, by the type that travels: ``"BF16"``, ``"F8_E4M3"``.
        changed_weights: Weights that were there before and had changes.
        shadow_bytes: Bytes of the copy that the trainer keeps of what it sent.
        attested: Whether all ranks computed the digest of their copies anew from memory.
        parts: The named parts of the version, if a copy of it is kept.
    """

    whole: str | None
    elements: dict[str, ChangedElements]
    changed_weights: int
    shadow_bytes: int
    attested: bool = False
    parts: dict[str, PartReport] = field(default_factory=dict)

    @property
    def changed_ratio(self) -> float:
        """The part of all elements that changed."""
        compared = sum(counts.compared for counts in self.elements.values())
        return sum(counts.changed for counts in self.elements.values()) / compared if compared else 0.0


@dataclass(frozen=True)
class SendReport:
    """What a trainer's update did.

    Attributes:
        version: The version sent.
        counts: The tensors, and their bytes.
        buckets: Buckets sent.
        plan_reused: Whether names and shapes were those of the update before.
        elapsed: Seconds from the call to the last rollout's confirmation.
        stages: Where that time went.
        digest: Of the whole version, if digests are on.
        receivers: Every rollout that took part.
        absent: Ranks that took no part because their processes died or left.
        slower: What fell back to something slower than was asked for, and why.
        delta: What had changed, where updates carry only that.
    """

    version: int
    counts: TensorCounts
    buckets: int
    plan_reused: bool
    elapsed: float
    stages: StageTimes
    digest: int | None
    receivers: tuple[ReceiverReport, ...]
    absent: tuple[int, ...]
    slower: tuple[str, ...] = ()
    delta: DeltaReport | None = None

    @property
    def gb_per_s(self) -> float:
        """Source bytes per second, in 10⁹ bytes."""
        return self.counts.source_bytes / 1e9 / self.elapsed if self.elapsed > 0 else 0.0

    def metrics(self, prefix: str = "checkpoint_engine/") -> dict[str, float]:
        """The numbers that a training loop logs, by names."""
        values: dict[str, float] = {
            "version": self.version,
            "seconds": self.elapsed,
            "gb_per_s": self.gb_per_s,
            "tensors": self.counts.tensors,
            "converted": self.counts.converted,
            "kept": self.counts.kept,
            "source_bytes": self.counts.source_bytes,
            "wire_bytes": self.counts.wire_bytes,
            "buckets": self.buckets,
            "rollouts": len(self.receivers),
            "absent": len(self.absent),
            "source_seconds": self.stages.source,
            "release_seconds": self.stages.release,
            "encode_seconds": self.stages.encode,
            "publish_seconds": self.stages.publish,
            "confirm_seconds": self.stages.confirm,
        }
        if self.delta is not None and self.delta.whole is None:
            values["changed_ratio"] = self.delta.changed_ratio
        return {prefix + name: float(value) for name, value in values.items()}


@dataclass(frozen=True)
class ReceiveReport:
    """What an update brought a rollout.

    Attributes:
        version: The version received.
        state: Its state here; ``"active"`` when it is complete on all ranks.
        tensors: Tensors, scales included.
        bytes: Bytes of tensors.
        buckets: Buckets received.
        elapsed: Seconds from the trainer's announcement to the end.
        digest: Of the version as far as this rank wants it, if digests are on.
        parts: The named parts of the version that are here, if this rank keeps a copy of it.
        wants: The parts that this rank wants, which is what it got; ``None`` for all.
        slower: What of this rank made the update slower than possible, and why.
    """

    version: int
    state: str
    tensors: int
    bytes: int
    buckets: int
    elapsed: float
    digest: int | None
    parts: dict[str, PartReport] = field(default_factory=dict)
    wants: tuple[str, ...] | None = None
    slower: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """A rank of the group.

    Attributes:
        rank: Its number, which the control plane gave.
        role: ``"trainer"`` or ``"rollout"``.
        host: Its host.
        pid: Its process there.
        attributes: What its program says of it.
    """

    rank: int
    role: str
    host: str
    pid: int
    attributes: Any


def _send_report(text: str) -> SendReport:
    data = json.loads(text)
    return SendReport(
        version=data["version"],
        counts=TensorCounts(**data["counts"]),
        buckets=data["buckets"],
        plan_reused=data["plan_reused"],
        elapsed=_seconds(data["elapsed"]),
        stages=StageTimes(**{name: _seconds(value) for name, value in data["stages"].items()}),
        digest=data["digest"],
        receivers=tuple(_receiver_report(receiver) for receiver in data["receivers"]),
        absent=tuple(data["absent"]),
        slower=tuple(data["slower"]),
        delta=_delta_report(data["delta"]),
    )


def _receiver_report(data: Any) -> ReceiverReport:
    return ReceiverReport(**{**data, "parts": tuple(data["parts"])})


def _delta_report(data: Any) -> DeltaReport | None:
    if data is None:
        return None
    elements = {dtype: ChangedElements(**counts) for dtype, counts in data["elements"].items()}
    return DeltaReport(**{**data, "elements": elements, "parts": _parts(data["parts"])})


def _parts(data: Any) -> dict[str, PartReport]:
    return {name: PartReport(**part) for name, part in data.items()}


def _receive_report(text: str) -> ReceiveReport:
    data = json.loads(text)
    elapsed, parts = _seconds(data["elapsed"]), _parts(data["parts"])
    wants = None if data["wants"] is None else tuple(data["wants"])
    given = {"elapsed": elapsed, "parts": parts, "wants": wants, "slower": tuple(data["slower"])}
    return ReceiveReport(**{**data, **given})


def _peers(text: str) -> tuple[Peer, ...]:
    names = ("rank", "role", "host", "pid", "attributes")
    return tuple(
        Peer(**{name: peer[name].lower() if name == "role" else peer[name] for name in names})
        for peer in json.loads(text)
    )
