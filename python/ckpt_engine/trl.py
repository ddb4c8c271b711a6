"""The engine as the weight transfer of TRL's asynchronous GRPO (1.16), into vLLM's server::

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "ckpt_engine"}'

    trainer = AsyncGRPOTrainer(..., weight_transfer=ckpt_engine.trl.WeightTransfer("http://localhost:8000"))

The server has this package installed. Neither TRL nor vLLM is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ._http import Server
from .reports import SendReport
from .vllm import Updates


class _Client:
    """vLLM's routes, as its own clients have them."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._server.post("/init_weight_transfer_engine", {"init_info": info})

    def start_weight_update(self) -> None:
        self._server.post("/start_weight_update")

    def update_weights(self, info: dict[str, Any]) -> None:
        self._server.post("/update_weights", {"update_info": info})

    def finish_weight_update(self) -> None:
        self._server.post("/finish_weight_update")


class WeightTransfer:
    """TRL's ``WeightTransferProtocol``: pauses vLLM, has its workers load what this engine sends, resumes it.

    Args:
        url: vLLM's server.
        config: The engine's configuration, as for :func:`ckpt_engine.form_group`: ``ipc``, with buckets on this process's
            GPU where it has one, unless set; ``{"backend": "nccl", "device": "cuda:0"}`` for a server on other GPUs.
        address: Where this trainer listens, and how vLLM's workers reach it. The default is for a server of the same host.
        ready_timeout: How many seconds the server may take to be ready.
        timeout: How many seconds it may take to answer; an update is one request.
        api_key: vLLM's ``--api-key``, if it has one.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        *,
        config: Mapping[str, Any] | None = None,
        address: str = "127.0.0.1:0",
        ready_timeout: float = 240.0,
        timeout: float = 1800.0,
        api_key: str | None = None,
    ) -> None:
        self._server = Server(url, timeout, api_key)
        self._config, self._address, self._ready = config, address, ready_timeout
        self._updates = Updates(_Client(self._server))

    @property
    def report(self) -> SendReport | None:
        """What became of the last update that worked."""
        return self._updates.report

    def init_weight_transfer(self) -> None:
        """Waits for the server, and forms the group with all of its workers.

        Raises:
            TimeoutError: If the server is not ready in time, or workers do not join.
            BackendError: If it refuses; what it says is in the error.
        """
        self._server.wait_until_ready(self._ready)
        workers = int(self._server.get("/get_world_size")["world_size"])
        self._updates.join(workers, self._address, self._config)

    def pause(self) -> None:
        """Freezes the requests in flight, before weights change under them."""
        self._server.post("/pause?mode=keep")

    def send_weights(self, iterator: Iterable[tuple[str, Any]]) -> None:
        """Sends one version, and returns when all workers have it.

        The iterator is drained to its end also where that fails: its items may be gathered by all trainers together.
        """
        iterator = iter(iterator)
        try:
            self._updates.send(iterator)
        finally:
            for _ in iterator:
                pass

    def resume(self) -> None:
        """Goes on with the requests."""
        self._server.post("/resume")

    def destroy(self) -> None:
        """Leaves the group."""
        self._updates.leave()
