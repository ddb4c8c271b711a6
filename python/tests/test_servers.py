"""Trainers that reach inference servers over HTTP: TRL's weight transfer into vLLM, and SGLang's custom loader.

The servers are stand-ins with the routes of vLLM 0.33 and SGLang 0.5.23, strict in what they take and when.
"""

from __future__ import annotations

import base64
import io
import pickle
import threading

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine
import ckpt_engine.sglang
import ckpt_engine.trl

from http_server import Routes
from test_vllm import Server as VllmServer
from test_vllm import model, vllm  # noqa: F401 - a fixture

CONFIG = {"backend": "ipc", "timeout_seconds": 10}


class Vllm(VllmServer):
    """vLLM's routes around its worker."""

    def __init__(self, vllm):
        super().__init__(vllm)
        self.paused = False
        self.web = Routes(
            {
                "/health": lambda _: {},
                "/get_world_size": lambda _: {"world_size": 1},
                "/pause?mode=keep": lambda _: self.pause(True),
                "/resume": lambda _: self.pause(False),
                "/init_weight_transfer_engine": lambda body: self.init_weight_transfer_engine(body["init_info"]),
                "/start_weight_update": lambda _: self.start_weight_update(),
                "/update_weights": lambda body: self.update_weights(body["update_info"]),
                "/finish_weight_update": lambda _: self.finish_weight_update(),
            }
        )

    def pause(self, paused):
        assert self.paused != paused
        self.paused = paused

    def update_weights(self, update_info):
        assert self.paused
        super().update_weights(update_info)


@pytest.fixture
def served(vllm):  # noqa: F811
    server = Vllm(vllm)
    yield server
    server.web.close()
    server.engine.shutdown()


def step(transfer, version, weights=None):
    """What TRL does to bring vLLM up to date."""
    transfer.pause()
    transfer.send_weights(iter((model(version) if weights is None else weights).items()))
    transfer.resume()


def test_trl_updates_the_workers_of_vllm_and_leaves(served):
    transfer = ckpt_engine.trl.WeightTransfer(served.web.url, config=CONFIG)
    transfer.init_weight_transfer()
    for version in (1, 2, 3):
        step(transfer, version)
        assert (transfer.report.version, served.finished, served.paused) == (version, version, False)
        seen = served.model.seen()
        assert all((seen[name] == tensor).all() for name, tensor in model(version).items())
    transfer.destroy()


def test_a_stream_that_fails_is_drained_and_told_and_the_next_update_works(served):
    transfer = ckpt_engine.trl.WeightTransfer(served.web.url, config=CONFIG)
    transfer.init_weight_transfer()
    step(transfer, 1)
    wrong = {**model(2), "layers.0.q": torch.zeros(3), "another": torch.zeros(1)}
    taken = []

    def items():
        for name, tensor in wrong.items():
            taken.append(name)
            yield name, tensor

    transfer.pause()
    with pytest.raises(ckpt_engine.Error):
        transfer.send_weights(items())
    assert taken == list(wrong)
    transfer.resume()
    step(transfer, 3)
    assert served.model.seen()["layers.0.q"].eq(model(3)["layers.0.q"]).all()
    transfer.destroy()


def test_a_server_that_is_not_there_or_not_for_this_is_named():
    transfer = ckpt_engine.trl.WeightTransfer("http://127.0.0.1:9", ready_timeout=0.5)
    with pytest.raises(ckpt_engine.TimeoutError, match="127.0.0.1:9.*not reached"):
        transfer.init_weight_transfer()
    # A server without VLLM_SERVER_DEV_MODE has no such routes.
    web = Routes({"/health": lambda _: {}})
    with pytest.raises(ckpt_engine.BackendError, match="get_world_size: 404"):
        ckpt_engine.trl.WeightTransfer(web.url).init_weight_transfer()
    web.routes["/get_world_size"] = lambda _: {"world_size": 1}
    with pytest.raises(ckpt_engine.BackendError, match="init_weight_transfer_engine: 404"):
        ckpt_engine.trl.WeightTransfer(web.url, config=CONFIG).init_weight_transfer()
    web.close()


class Reader(pickle.Unpickler):
    """What SGLang reads of a request: a short list of classes and functions."""

    def find_class(self, module, name):
        assert (module, name) == ("torch", "Tensor"), (module, name)
        return super().find_class(module, name)


class SglangModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        names = model(0)
        self.layers = torch.nn.ParameterDict(
            {name.replace(".", "_"): torch.nn.Parameter(torch.zeros_like(tensor)) for name, tensor in names.items()}
        )
        self.fails = None

    def load_weights(self, weights):
        for name, tensor in weights:
            if self.fails == name:
                raise ValueError(f"{name} cannot be loaded")
            self.layers[name.replace(".", "_")].data.copy_(tensor)


class Sglang:
    """A server of SGLang with one worker. Its process is this one, as the worker's module is: one at a time."""

    def __init__(self):
        self.model, self.version, self.paused, self.session = SglangModel(), None, False, False
        self.lock = threading.Lock()
        self.web = Routes(
            {
                "/pause_generation": self.pause,
                "/continue_generation": self.go_on,
                "/begin_weight_update": lambda _: self.bracket(True),
                "/end_weight_update": lambda _: self.bracket(False),
                "/update_weights_from_tensor": self.update,
            }
        )

    def pause(self, body):
        assert not self.paused and body["mode"] in ("abort", "retract", "in_place")
        self.paused = True
        return {"status": "ok"}

    def go_on(self, _):
        assert self.paused
        self.paused = False
        return {"status": "ok"}

    def bracket(self, begins):
        assert self.session != begins
        self.session = begins
        return {"success": True, "message": ""}

    def update(self, body):
        assert self.paused and body["load_format"] == "ckpt_engine.sglang.load"
        (one,) = body["serialized_named_tensors"]
        named = Reader(io.BytesIO(base64.b64decode(one, validate=True))).load()
        named = [(name, tensor.to("cpu")) for name, tensor in named]
        with self.lock:
            ckpt_engine.sglang.load(self.model, named)
        self.version = body["weight_version"]
        return {"success": True, "message": "Success"}

    def has(self, version):
        return all((self.model.layers[n.replace(".", "_")] == t).all() for n, t in model(version).items())


@pytest.fixture
def sglang():
    server = Sglang()
    yield server
    server.web.close()
    ckpt_engine.sglang.leave_group()


def test_sglangs_loader_receives_every_version_in_one_group(sglang):
    servers = ckpt_engine.sglang.Servers([sglang.web.url], config=CONFIG)
    groups = set()
    for version in (1, 2, 3):
        report = servers.update(model(version), version)
        assert (report.version, sglang.version, sglang.paused) == (version, str(version), False)
        assert sglang.has(version)
        groups.add(servers._group[0])
    assert len(groups) == 1 and "/begin_weight_update" not in sglang.web.asked
    servers.leave()


def test_quantised_models_are_opened_and_closed_around_an_update_also_one_that_fails(sglang):
    servers = ckpt_engine.sglang.Servers([sglang.web.url], config=CONFIG, quantized=True)
    sglang.model.fails = "layers.1.k"
    with pytest.raises(ckpt_engine.AbortedError, match="layers.1.k cannot be loaded"):
        servers.update(model(1), 1)
    assert not sglang.session and not sglang.paused
    sglang.model.fails = None
    servers.update(model(2), 2)
    assert sglang.has(2) and not sglang.session
    assert sglang.web.asked[-5:] == [
        "/pause_generation", "/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update",
        "/continue_generation",
    ]
    servers.leave()


def test_another_trainer_takes_over(sglang):
    first = ckpt_engine.sglang.Servers([sglang.web.url], config=CONFIG)
    first.update(model(1), 1)
    second = ckpt_engine.sglang.Servers([sglang.web.url], config=CONFIG)
    second.update(model(7), 7)
    assert sglang.has(7)
    first.leave()
    second.leave()


def test_a_server_without_the_loader_is_not_waited_for(sglang):
    del sglang.web.routes["/update_weights_from_tensor"]
    servers = ckpt_engine.sglang.Servers([sglang.web.url], config=CONFIG)
    with pytest.raises(ckpt_engine.BackendError, match="update_weights_from_tensor: 404"):
        servers.update(model(1), 1)
    assert not sglang.paused


def test_a_request_with_weights_in_it_is_refused(sglang):
    with pytest.raises(ckpt_engine.ProtocolError, match="takes no weights"):
        ckpt_engine.sglang.load(sglang.model, [("layers.0.q", torch.zeros(2)), ("layers.0.k", torch.zeros(2))])
