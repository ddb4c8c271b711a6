"""Moves a model's weights from a trainer to its inference engines, every training step.

A trainer sends pairs of a name and a tensor; every rollout gets the same weights, verified, or an error::

    # on the trainer
    control = ckpt_engine.ControlPlane.lead("0.0.0.0:29600", token)
    engine = ckpt_engine.form_group(control, {"backend": "ipc"}, world_size=2)
    engine.send_weights(model.named_parameters(), version=step)

    # on each rollout
    control = ckpt_engine.ControlPlane.join("trainer-host:29600", token)
    engine = ckpt_engine.form_group(control, {"backend": "ipc"})
    with engine.receive_weights(framework="torch") as weights:
        model.load_weights(weights)

Nothing is imported but this package's own module: neither torch nor numpy.
"""

from __future__ import annotations

import atexit

from . import _native
from ._logs import enable_logging
from ._native import Box, Fp8, Tensor, build_info, generate_token, read_token
from .engine import (
    Channel,
    ControlPlane,
    Destination,
    PlacedRollout,
    ReceivedWeights,
    RolloutEngine,
    TrainerEngine,
    check_config,
    form_group,
    form_group_async,
    form_local_group,
    in_thread,
)
from .errors import (
    AbortedError,
    AuthenticationError,
    BackendError,
    ConfigError,
    DigestError,
    Error,
    IoError,
    MismatchError,
    PeerLost,
    ProtocolError,
    ResourceError,
    SourceError,
    StateError,
    TimeoutError,
    TrainerLeft,
    WeightError,
)
from .manager import LocalRollout, Manager, RolloutWorker
from .reports import (
    ChangedElements,
    DeltaReport,
    PartReport,
    Peer,
    ReceiveReport,
    ReceiverReport,
    SendReport,
    StageTimes,
    TensorCounts,
)

__version__: str = build_info()["version"]

__all__ = [
    "AbortedError",
    "AuthenticationError",
    "BackendError",
    "Box",
    "ChangedElements",
    "Channel",
    "ConfigError",
    "ControlPlane",
    "DeltaReport",
    "Destination",
    "DigestError",
    "Error",
    "Fp8",
    "IoError",
    "LocalRollout",
    "Manager",
    "MismatchError",
    "PartReport",
    "Peer",
    "PeerLost",
    "PlacedRollout",
    "ProtocolError",
    "ReceiveReport",
    "ReceivedWeights",
    "ReceiverReport",
    "ResourceError",
    "RolloutEngine",
    "RolloutWorker",
    "SendReport",
    "SourceError",
    "StageTimes",
    "StateError",
    "Tensor",
    "TensorCounts",
    "TimeoutError",
    "TrainerLeft",
    "TrainerEngine",
    "WeightError",
    "build_info",
    "check_config",
    "enable_logging",
    "form_group",
    "form_group_async",
    "form_local_group",
    "generate_token",
    "in_thread",
    "read_token",
]

# An update that runs when the interpreter ends is aborted on every rank, not cut off.
atexit.register(_native.end_all, 2.0)
