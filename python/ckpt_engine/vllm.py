"""The engine as a weight transfer engine of vLLM (0.33): the worker's side, and a trainer's.

vLLM finds it by itself where this package is installed (entry point ``vllm.general_plugins``)::

    vllm serve MODEL --weight-transfer-config '{"backend": "ckpt_engine"}'

Every worker is a rollout of the group. The trainer leads it, tells the workers where (``init_weight_transfer_engine``
with :func:`init_info`), and sends while vLLM receives (``update_weights`` with ``{"version": step}``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .engine import ControlPlane, RolloutEngine, form_group
from .errors import StateError

#: The name in vLLM's factory.
BACKEND = "ckpt_engine"


def register() -> None:
    """Makes the engine known to vLLM; called by vLLM in each of its processes."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(BACKEND, __name__, "CkptWeightTransferEngine")


def init_info(
    control: ControlPlane, token: bytes, world_size: int, config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the trainer passes to ``init_weight_transfer_engine``: plain JSON.

    Args:
        control: The trainer's control plane.
        token: The group's secret. Whoever sees the request can join the group: use a connection that is trusted.
        world_size: How many ranks the group has: the trainer and all workers of vLLM.
        config: The engine's configuration, as for :func:`ckpt_engine.form_group`.
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


def _worker_class() -> type:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    class CkptWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc,valid-type]
        """A worker's end: receives checkpoint tensors, and has the model load them."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        _control: ControlPlane | None = None
        _engine: RolloutEngine | None = None

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Joins the group; a group of before is left."""
            self.shutdown()
            self._control = ControlPlane.join(init_info.address, init_info.token.encode("ascii"))
            engine = form_group(self._control, init_info.config, world_size=init_info.world_size)
            assert isinstance(engine, RolloutEngine)
            self._engine = engine

        def start_weight_update(self) -> None:
            """Prepares the model's layers for weights in the checkpoint's layout."""
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            """Receives one version into the model, whose loader copies every tensor."""
            if self._engine is None:
                raise StateError(
                    "init_transfer_engine has not been called", operation="receiving weights"
                )
            # A reload by layers keeps tensors until their layer is complete: in buckets they would stop the
            # update, so they get memory of their own.
            with self._engine.receive_weights(
                update_info.version, framework="torch", copy=True
            ) as weights:
                self.model.load_weights(
                    (name, tensor.to(self.device)) for name, tensor in weights
                )
                # A loader that stops early would leave the version incomplete.
                for _ in weights:
                    pass

        def finish_weight_update(self) -> None:
            """Processes the layers that came."""
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """Leaves the group."""
            engine, control = self._engine, self._control
            self._engine = self._control = None
            if engine is not None:
                engine.finalize()
            if control is not None:
                control.close()

        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            """Sends with a :class:`ckpt_engine.TrainerEngine`: ``{"engine": …, "version": …}``."""
            trainer_args["engine"].send_weights(iterator, trainer_args["version"])

    return CkptWeightTransferEngine


def __getattr__(name: str) -> Any:
    # The class has vLLM's as its base: it is made when vLLM asks for it.
    if name == "CkptWeightTransferEngine":
        made = _worker_class()
        globals()[name] = made
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
