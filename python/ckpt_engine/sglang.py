"""The engine in SGLang's workers, as a custom weight loader (SGLang 0.5.23)::

    python -m sglang.launch_server --model-path MODEL --custom-weight-loader ckpt_engine.sglang.load

    # on the trainer
    servers = ckpt_engine.sglang.Servers(["http://localhost:30000"], workers=1)
    report = servers.update(model.named_parameters(), version=step)

The servers have this package installed. Every worker is a rollout of the group, which the trainer leads: it joins when an
update asks it to, and again when the trainer is another one. SGLang is not imported here.
"""

from __future__ import annotations

import base64
import json
import logging
import pickle
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from . import generate_token
from ._http import Server
from .engine import ControlPlane, RolloutEngine, TrainerEngine, form_group, leave
from .errors import BackendError, Error, ProtocolError
from .reports import SendReport
from .vllm import _copies, _default_config, init_info

#: The name of the loader, as SGLang takes it.
LOADER = "ckpt_engine.sglang.load"

_LOGGER = logging.getLogger("ckpt_engine.sglang")

# The group that this worker is in. A draft model of the same process gets the same weights, by an update of its own.
_member: tuple[str, ControlPlane, RolloutEngine] | None = None


def load(model: Any, named_tensors: Any) -> None:
    """Receives one version into a model: SGLang calls it in each of its workers.

    Args:
        model: SGLang's model; its ``load_weights`` gets copies of the tensors on the model's device.
        named_tensors: What came with the request: one empty tensor, whose name says how to reach the trainer.

    Raises:
        Error: Of this engine; SGLang answers the trainer's request with it.
    """
    device = next(model.parameters()).device
    engine, version = _join(named_tensors, device)
    try:
        with engine.receive_weights(version, framework="torch") as weights:
            model.load_weights(_copies(weights, device))
            # A loader that stops early would leave the version incomplete.
            weights.finish()
    except Error as error:
        if _is_over(error):
            leave_group()
        raise


def _is_over(error: Error) -> bool:
    """Whether the group has to be formed anew."""
    return error.recovery != "Retry" or error.kind in ("PeerLost", "TrainerLeft")


def _join(named_tensors: Any, device: Any) -> tuple[RolloutEngine, int]:
    """This worker's engine in the group that a request names, and the version that comes."""
    global _member
    try:
        ((request, _),) = named_tensors
        request = json.loads(request)
        group, version, info = request["group"], int(request["version"]), request["info"]
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(
            "the request is none of ckpt_engine.sglang.Servers: this loader takes no weights with it",
            operation="loading weights",
        ) from error
    if _member is not None and _member[0] == group:
        return _member[2], version
    leave_group()
    config = dict(info["config"])
    if device.type == "cuda" and config.get("device", "cpu") != "cpu":
        config["device"] = f"cuda:{device.index or 0}"
    control = ControlPlane.join(info["address"], info["token"].encode("ascii"))
    try:
        engine = form_group(control, config, world_size=info["world_size"])
    except BaseException:
        control.close()
        raise
    assert isinstance(engine, RolloutEngine)
    _member = group, control, engine
    return engine, version


def leave_group() -> None:
    """Leaves the group, in a worker; the next update joins again."""
    global _member
    member, _member = _member, None
    if member is not None:
        leave(member[2], member[1])


class _Empty:
    """An empty tensor, to the process that reads it: SGLang reads classes and functions of a short list only."""

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        return torch.Tensor, ()


class Servers:
    """SGLang's servers, for a trainer.

    Args:
        urls: The servers.
        workers: How many workers each of them has (its ``--tp`` times its ``--dp``): each is a rollout.
        config: The engine's configuration, as for :func:`ckpt_engine.form_group`: ``ipc``, with buckets on this process's
            GPU where it has one, unless set; ``{"backend": "nccl", "device": "cuda:0"}`` for servers on other GPUs.
        address: Where this trainer listens, and how workers reach it. The default is for servers of the same host.
        quantized: Whether their models are quantised in place: SGLang's `begin_weight_update` and `end_weight_update` go
            around every update then.
        timeout: How many seconds a server may take to answer; an update is one request.
        api_key: The servers' ``--api-key``, if they have one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        workers: int = 1,
        *,
        config: Mapping[str, Any] | None = None,
        address: str = "127.0.0.1:0",
        quantized: bool = False,
        timeout: float = 1800.0,
        api_key: str | None = None,
    ) -> None:
        if not urls or workers < 1:
            raise ValueError("there is no server, or none of its workers")
        self._servers = [Server(url, timeout, api_key) for url in urls]
        self._workers, self._address, self._quantized = workers, address, quantized
        self._config = config
        self._group: tuple[str, dict[str, Any]] | None = None
        self._control: ControlPlane | None = None
        self._engine: TrainerEngine | None = None

    def update(
        self,
        weights: Iterable[tuple[str, Any]] | Mapping[str, Any],
        version: int,
        *,
        pause: bool = True,
        timeout: float = 60.0,
    ) -> SendReport:
        """Has all workers load a version; forms the group with them in the first one, and after failures that ask for it.

        Args:
            weights: As for :meth:`TrainerEngine.send_weights`.
            version: The weights' number; the servers say it as their ``weight_version``.
            pause: Whether generation is paused around it.
            timeout: How many seconds the workers may take to join, and the servers to answer after an update that failed.

        Raises:
            Error: What ends an update ends it on every rank, and is told by each server. A server's model may be a mixture of
                two versions then: update it again before it is used.
        """
        if self._group is None:
            token, world_size = generate_token(), 1 + self._workers * len(self._servers)
            config = dict(self._config or _default_config())
            self._control = ControlPlane.lead(self._address, token)
            self._group = uuid.uuid4().hex, init_info(self._control, token, world_size, config)
        asked = self._ask(version, pause)
        try:
            if self._engine is None:
                self._form(asked, timeout)
            assert self._engine is not None
            report = self._engine.send_weights(weights, version)
        except Exception as error:
            # What ends an update ends it on every rank, so that the servers answer soon; they go on then.
            wait([answer for _, answer in asked], timeout)
            for _, answer in asked:
                if answer.done() and (failed := answer.exception()):
                    _LOGGER.warning("version %s: %s", version, failed)
            if self._engine is None or isinstance(error, Error) and _is_over(error):
                self.leave()
            raise
        for _, answer in asked:
            answer.result()
        return report

    def _form(self, asked: list[tuple[Server, Future[None]]], timeout: float) -> None:
        assert self._group is not None and self._control is not None
        control, (_, info) = self._control, self._group

        def refused(answer: Future[None]) -> None:
            """A server that refuses to join is not waited for."""
            if self._engine is None and answer.exception():
                control.close()

        for _, answer in asked:
            answer.add_done_callback(refused)
        try:
            engine = form_group(control, info["config"], world_size=info["world_size"], timeout=timeout)
        except Exception:
            for _, answer in asked:
                if answer.done():
                    answer.result()
            raise
        assert isinstance(engine, TrainerEngine)
        self._engine = engine

    def _ask(self, version: int, pause: bool) -> list[tuple[Server, Future[None]]]:
        """Has each server receive a version; the answers come when it has."""
        assert self._group is not None
        group, info = self._group
        request = json.dumps({"group": group, "version": version, "info": info})
        one = base64.b64encode(pickle.dumps([(request, _Empty())])).decode()
        body = {
            # One for each worker of a server, which reads its own.
            "serialized_named_tensors": [one] * self._workers,
            "load_format": LOADER,
            "weight_version": str(version),
        }
        pool = ThreadPoolExecutor(len(self._servers), "ckpt-sglang")
        try:
            return [(server, pool.submit(self._load, server, body, pause)) for server in self._servers]
        finally:
            pool.shutdown(wait=False)

    def _load(self, server: Server, body: dict[str, Any], pause: bool) -> None:
        if pause:
            server.post("/pause_generation", {"mode": "retract"})
        try:
            if self._quantized:
                server.post("/begin_weight_update")
            try:
                answer = server.post("/update_weights_from_tensor", body)
            finally:
                if self._quantized:
                    server.post("/end_weight_update")
            if not (isinstance(answer, dict) and answer.get("success")):
                message = answer.get("message") if isinstance(answer, dict) else answer
                raise BackendError(f"{server.url} has not loaded it: {message}", operation="updating a server")
        finally:
            if pause:
                server.post("/continue_generation")

    def leave(self) -> None:
        """Leaves the group; the next update forms one anew."""
        engine, control = self._engine, self._control
        self._engine = self._control = self._group = None
        leave(engine, control)
