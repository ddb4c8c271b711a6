"""The engine as a weight transfer engine of vLLM (0.26 to 0.33): the worker's side, and a trainer's.

vLLM finds it by itself where this package is installed (entry point ``vllm.general_plugins``)::

    vllm serve MODEL --weight-transfer-config '{"backend": "ckpt_engine"}'

Every worker is a rollout of the group, which the trainer leads. A trainer either uses vLLM's own interface, with
:func:`trainer` or ``WeightTransferTrainerFactory``, or drives vLLM itself: it tells the workers where it is
(``init_weight_transfer_engine`` with :func:`init_info`), and sends while vLLM receives (``update_weights`` with
``{"version": step}``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from . import generate_token
from .engine import ControlPlane, RolloutEngine, TrainerEngine, form_group, leave
from .errors import StateError
from .reports import SendReport

#: The name in vLLM's factories.
BACKEND = "ckpt_engine"

_LOGGER = logging.getLogger("ckpt_engine.vllm")


def register() -> None:
    """Makes both ends known to vLLM; called by vLLM in each of its processes. A trainer's process calls it itself."""
    try:
        from vllm.distributed.weight_transfer import (
            WeightTransferEngineFactory,
            WeightTransferTrainerFactory,
        )
    except ImportError as error:
        _LOGGER.debug("this vLLM takes no weight transfer engine: %s", error)
        return
    for factory, name in (
        (WeightTransferEngineFactory, "CkptWeightTransferEngine"),
        (WeightTransferTrainerFactory, "CkptTrainerEngine"),
    ):
        if BACKEND not in factory._registry:
            factory.register_engine(BACKEND, __name__, name)


def init_info(
    control: ControlPlane, token: bytes, world_size: int, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the trainer passes to ``init_weight_transfer_engine``: plain JSON.

    Args:
        control: The trainer's control plane.
        token: The group's secret. Anybody who sees the request can join the group: use a connection that is trusted.
        world_size: How many ranks the group has: the trainer and all workers of vLLM.
        config: The engine's configuration, as for :func:`ckpt_engine.form_group`. Where its ``device`` is a GPU,
            each worker takes its own.
    """
    return {
        "address": control.address,
        "token": token.decode("ascii"),
        "world_size": world_size,
        "config": dict(config or {"backend": "ipc"}),
    }


@dataclass
class InitInfo:
    """How a worker joins the group."""

    address: str
    token: str
    world_size: int
    config: dict[str, Any] = field(default_factory=lambda: {"backend": "ipc"})


@dataclass
class UpdateInfo:
    """Which version comes; any unless set."""

    version: int | None = None


def _worker_config(config: Mapping[str, Any], device: Any, model_config: Any) -> dict[str, Any]:
    """The trainer's configuration as a worker's: its own GPU, and what its model can load."""
    config = dict(config)
    if device.type == "cuda" and config.get("device", "cpu") != "cpu":
        config["device"] = f"cuda:{device.index or 0}"
    checkpoint = getattr(getattr(model_config, "hf_config", None), "quantization_config", None)
    contract: dict[str, Any] = {}
    if checkpoint is None:
        contract["accepts"] = "unquantized"
    elif isinstance(checkpoint, Mapping) and checkpoint.get("weight_block_size"):
        # Block FP8: the layers that the checkpoint has not in FP8 are told to the trainer as well.
        ignored = checkpoint.get("modules_to_not_convert") or checkpoint.get("ignored_layers")
        contract = {"accepts": "fp8", "ignored_layers": list(ignored or [])}
    config["quantization"] = {**contract, **(config.get("quantization") or {})}
    return config


def _copies(weights: Iterable[tuple[str, Any]], device: Any) -> Iterator[tuple[str, Any]]:
    """Tensors out of their buckets: a reload by layers keeps them until their layer is complete, and would stop the
    update."""
    for name, tensor in weights:
        copy = tensor.to(device, copy=True)
        # An exception keeps what its frames have.
        del tensor
        yield name, copy
        del copy


def _worker_class() -> type:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    class CkptWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc,valid-type]
        """A worker's end: receives checkpoint tensors, and has the model load them."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo
        # A draft model's weights would be other names than those of the version before.
        supports_draft_weight_update = False

        _control: ControlPlane | None = None
        _engine: RolloutEngine | None = None
        # Whether all weights of the update that was begun have come.
        _complete = False

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Joins the group; a group of before is left."""
            self.shutdown()
            config = _worker_config(init_info.config, self.device, self.model_config)
            self._control = ControlPlane.join(init_info.address, init_info.token.encode("ascii"))
            engine = form_group(self._control, config, world_size=init_info.world_size)
            assert isinstance(engine, RolloutEngine)
            self._engine = engine

        def start_weight_update(self) -> None:
            """Prepares the model's layers for weights in the checkpoint's layout."""
            # One that was begun and not finished, because another worker failed, left parts of its weights.
            self._forget()
            self._complete = False
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            """Receives one version into the model, whose loader copies every tensor."""
            if self._engine is None:
                raise StateError(
                    "init_transfer_engine has not been called", operation="receiving weights"
                )
            try:
                with self._engine.receive_weights(update_info.version, framework="torch") as weights:
                    self.model.load_weights(_copies(weights, self.device))
                    # A loader that stops early would leave the version incomplete.
                    weights.finish()
                self._complete = True
            except BaseException:
                self._restore()
                raise

        def finish_weight_update(self) -> None:
            """Processes the layers that came; those of an update that never came get their weights back."""
            if not self._complete:
                self._forget()
            finalize_layerwise_reload(self.model, self.model_config)

        def _forget(self) -> None:
            """Forgets weights that wait for the rest of their layer: vLLM would count them in the next update."""
            for layer in self.model.modules():
                info = get_layerwise_info(layer)
                info.loaded_weights.clear()
                info.load_numel = 0

        def _restore(self) -> None:
            """Makes the model whole after an update that failed: layers that were complete have the new weights, the
            others those of before. The next update replaces them all."""
            self._forget()
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """Leaves the group."""
            engine, control = self._engine, self._control
            self._engine = self._control = None
            leave(engine, control)

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            """Sends with a :class:`ckpt_engine.TrainerEngine`: ``{"engine": …, "version": …}``."""
            trainer_args["engine"].send_weights(iterator, trainer_args["version"])

    return CkptWeightTransferEngine


def _info_class() -> type:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo as Base

    @dataclass
    class TrainerInitInfo(Base):  # type: ignore[misc,valid-type]
        """A trainer's end: how many workers join, and how.

        Attributes:
            workers: How many workers vLLM has, over all replicas: each is a rollout.
            address: Where this trainer listens, and how workers reach it.
            config: The engine's configuration, as for :func:`ckpt_engine.form_group`: ``ipc``, with buckets on this
                process's GPU where it has one, unless set.
            rank: This trainer's number; 0 sends.
        """

        backend: ClassVar[str] = BACKEND

        workers: int = 1
        address: str = "127.0.0.1:0"
        config: dict[str, Any] | None = None

    return TrainerInitInfo


def _default_config() -> dict[str, Any]:
    import torch

    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return {"backend": "ipc", "device": device}


class Updates:
    """A trainer that has vLLM's workers load what it sends. It is vLLM's own interface without its base classes.

    Args:
        client: How vLLM is reached: an object with ``init_weight_transfer_engine(dict)``, ``start_weight_update()``,
            ``update_weights(dict)`` and ``finish_weight_update()``, as vLLM's own clients are.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        #: The last version that was begun.
        self.version = 0
        #: What became of the last update that worked.
        self.report: SendReport | None = None
        self._control: ControlPlane | None = None
        self._engine: TrainerEngine | None = None

    def join(self, workers: int, address: str, config: Mapping[str, Any] | None = None) -> None:
        """Forms the group with so many workers, over all replicas.

        Args:
            workers: How many workers vLLM has: each is a rollout.
            address: Where this trainer listens, and how workers reach it: ``host:port``, port 0 for any that is free.
            config: The engine's configuration, as for :func:`ckpt_engine.form_group`: ``ipc``, with buckets on this
                process's GPU where it has one, unless set.
        """
        token, world_size = generate_token(), 1 + workers
        config = dict(config or _default_config())
        control = self._control = ControlPlane.lead(address, token)
        request = init_info(control, token, world_size, config)
        joining = _beside(self.client.init_weight_transfer_engine, request)
        # Workers that cannot join are not waited for.
        joining.add_done_callback(lambda done: control.close() if done.exception() else None)
        try:
            engine = form_group(control, config, world_size=world_size)
        except Exception:
            if joining.done():
                joining.result()
            control.close()
            raise
        joining.result()
        assert isinstance(engine, TrainerEngine)
        self._engine = engine

    def send(self, weights: Iterable[Any]) -> SendReport:
        """Sends one version, numbered from 1, and has all workers load it."""
        if self._engine is None:
            raise StateError("no group was formed", operation="sending weights")
        self.version += 1
        try:
            self.client.start_weight_update()
        except Exception:
            if self.version > 1:
                raise
            # A trainer before this one may have died after it began an update, which vLLM still waits for.
            self.client.finish_weight_update()
            self.client.start_weight_update()
        updating = _beside(self.client.update_weights, {"version": self.version})
        try:
            self.report = self._engine.send_weights(weights, self.version)
        except Exception:
            # What ends an update ends it on every rank.
            if failed := updating.exception():
                _LOGGER.warning("version %s in vLLM: %s", self.version, failed)
            raise
        updating.result()
        self.client.finish_weight_update()
        return self.report

    def leave(self) -> None:
        """Leaves the group."""
        engine, control = self._engine, self._control
        self._engine = self._control = None
        leave(engine, control)


def _trainer_class() -> type:
    from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine

    class CkptTrainerEngine(TrainerWeightTransferEngine):  # type: ignore[misc,valid-type]
        """A trainer's end, for vLLM's ``WeightTransferTrainerFactory``."""

        init_info_cls = _lazy("TrainerInitInfo")

        def __init__(self, init_info: Any, client: Any, source: Any) -> None:
            # The base class takes other arguments in each version of vLLM, and keeps these.
            self.client, self.source = client, source
            self.rank, self.is_sender = init_info.rank, init_info.is_sender
            self._updates = Updates(client)

        @property
        def version(self) -> int:
            """The last version that was begun, on the trainer that sends."""
            return self._updates.version

        @property
        def report(self) -> SendReport | None:
            """What became of the last update that worked, on the trainer that sends."""
            return self._updates.report

        @classmethod
        def trainer_init(
            cls, init_info: Any, *, client: Any, source: Any = None, config: Any = None
        ) -> CkptTrainerEngine:
            """Forms the group with all workers; on the other trainers, does nothing.

            Args:
                init_info: A :class:`TrainerInitInfo`.
                client: vLLM's ``VLLMWeightSyncClient``.
                source: The weights of every version.
                config: vLLM 0.26 passes its own; nothing of it is needed.
            """
            if source is None:
                raise ValueError("ckpt_engine sends the weights of a WeightSource: pass `source`")
            self = cls(init_info, client, source)
            if not self.is_sender:
                return self
            self._updates.join(init_info.workers, init_info.address, init_info.config)
            return self

        def send_weights(self) -> None:
            """Sends one version, numbered from 1, and has all workers load it."""
            source = self.source
            weights: Iterable[Any] = iter(
                source.iter_full() if hasattr(source, "iter_full") else source
            )
            try:
                if self.is_sender:
                    self._updates.send(weights)
            finally:
                # Items may be gathered by all trainers together.
                for _ in weights:
                    pass

        def shutdown(self) -> None:
            """Leaves the group."""
            self._updates.leave()

    return CkptTrainerEngine


def _beside(call: Any, argument: Any) -> Future[Any]:
    """A call of vLLM's that returns when this trainer has done its part."""
    pool = ThreadPoolExecutor(1, "ckpt-vllm")
    try:
        return pool.submit(call, argument)
    finally:
        pool.shutdown(wait=False)


# Classes that have vLLM's as their base: they are made when somebody asks for them.
_LAZY = {
    "CkptWeightTransferEngine": _worker_class,
    "CkptTrainerEngine": _trainer_class,
    "TrainerInitInfo": _info_class,
}


def _lazy(name: str) -> Any:
    made = globals().get(name)
    if made is None:
        made = globals()[name] = _LAZY[name]()
    return made


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return _lazy(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
