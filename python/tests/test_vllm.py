"""The weight transfer engine of vLLM, against stand-ins of what it uses of vLLM 0.26 and 0.33: base classes,
factories, the reload by layers, and the worker that calls the engine. A real vLLM runs on a GPU only."""

from __future__ import annotations

import abc
import sys
import types
from dataclasses import dataclass, field
from functools import cached_property

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine

from ranks import in_thread

CONFIG = {"backend": "ipc", "update_weights_bucket_megabytes": 1, "timeout_seconds": 10}


# vllm/model_executor/model_loader/reload/layerwise.py: a layer takes its weights when all of them have come.
@dataclass
class Info:
    load_numel: int = 0
    load_numel_total: int | None = None
    loaded_weights: list = field(default_factory=list)

    def reset(self):
        self.__init__()

    def can_load(self):
        return self.load_numel_total is not None


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.info = Info()
        for name in ("q", "k", "v"):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(256, 512)))


def get_layerwise_info(layer):
    return getattr(layer, "info", None) or Info()


def initialize_layerwise_reload(model):
    for layer in model.layers:
        if not layer.info.can_load():
            layer.info.load_numel, layer.info.load_numel_total = 0, 3 * 256 * 512


def load(layer, name, tensor):
    info = layer.info
    if not info.can_load():
        return
    info.loaded_weights.append((name, tensor))
    info.load_numel += tensor.numel()
    if info.load_numel >= info.load_numel_total:
        for name, tensor in info.loaded_weights:
            getattr(layer, name).data.copy_(tensor)
        info.reset()


def finalize_layerwise_reload(model, model_config):
    assert model_config.is_there
    for layer in model.layers:
        if 0 < layer.info.load_numel:
            raise AssertionError("a layer was processed without all of its weights")
        layer.info.reset()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(4))

    def load_weights(self, weights):
        for name, tensor in weights:
            _, number, part = name.split(".")
            load(self.layers[int(number)], part, tensor)

    def seen(self):
        return {f"layers.{n}.{p}": getattr(layer, p).data for n, layer in enumerate(self.layers) for p in "qkv"}


# vllm/distributed/weight_transfer/base.py.
class WorkerBase(abc.ABC):
    supports_draft_weight_update = True

    def __init__(self, config, vllm_config, device, model):
        self.config, self.vllm_config, self.device, self.model = config, vllm_config, device, model
        self.parallel_config, self.model_config = vllm_config.parallel_config, vllm_config.model_config

    def parse_init_info(self, values):
        return self.parse(self.init_info_cls, values)

    def parse(self, cls, values):
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"Invalid info: {error}") from error

    def update_weights(self, update_info):
        self.receive_weights(self.parse(self.update_info_cls, update_info))

    for name in ("init_transfer_engine", "start_weight_update", "finish_weight_update", "receive_weights", "shutdown"):
        locals()[name] = abc.abstractmethod(lambda self, *arguments: None)


class Worker26(WorkerBase):
    @staticmethod
    @abc.abstractmethod
    def trainer_send_weights(iterator, trainer_args):
        raise NotImplementedError


@dataclass
class TrainerInfo26(abc.ABC):
    rank: int = field(kw_only=True)

    @property
    def is_sender(self):
        return self.rank == 0


@dataclass
class TrainerInfo33:
    rank: int = field(kw_only=True)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not getattr(cls, "backend", None):
            raise TypeError("set a class-level `backend` string")

    is_sender = TrainerInfo26.is_sender


class Trainer26(abc.ABC):
    def __init__(self, config, *, client, source, is_sender=True):
        raise AssertionError("each version has other arguments")

    trainer_init = classmethod(abc.abstractmethod(lambda cls, config, init_info, *, client, source: None))
    send_weights = abc.abstractmethod(lambda self: None)

    def shutdown(self):
        pass


class Trainer33(Trainer26):
    trainer_init = classmethod(abc.abstractmethod(lambda cls, init_info, *, client, source=None: None))


class Factory:
    def __init__(self, version=None):
        self._registry, self.version = {}, version

    def register_engine(self, name, module, class_name):
        if name in self._registry:
            raise ValueError(f"{name} is already registered")
        self._registry[name] = lambda: getattr(sys.modules[module], class_name)

    def trainer_init(self, *arguments, **keywords):
        if self.version == "0.26":
            backend, config, init_info = arguments
            return self._registry[backend]().trainer_init(config=config, init_info=init_info, **keywords)
        (init_info,) = arguments
        return self._registry[init_info.backend]().trainer_init(init_info=init_info, **keywords)


@pytest.fixture(params=["0.26", "0.33"])
def vllm(request, monkeypatch):
    """The plugin within a stand-in of a version of vLLM, and what that has."""
    old = request.param == "0.26"
    engines, trainers = Factory(), Factory(request.param)
    base = types.ModuleType("vllm.distributed.weight_transfer.base")
    base.WeightTransferEngine = Worker26 if old else WorkerBase
    base.TrainerInitInfo = TrainerInfo26 if old else TrainerInfo33
    base.TrainerWeightTransferEngine = Trainer26 if old else Trainer33
    transfer = types.ModuleType("vllm.distributed.weight_transfer")
    transfer.WeightTransferEngineFactory, transfer.WeightTransferTrainerFactory = engines, trainers
    reload = types.ModuleType("vllm.model_executor.model_loader.reload")
    layerwise = types.ModuleType("vllm.model_executor.model_loader.reload.layerwise")
    reload.initialize_layerwise_reload = initialize_layerwise_reload
    reload.finalize_layerwise_reload = finalize_layerwise_reload
    layerwise.get_layerwise_info = get_layerwise_info
    for name in ("vllm", "vllm.distributed", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (base, transfer, reload, layerwise):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    import ckpt_engine.vllm as plugin

    for name in plugin._LAZY:
        monkeypatch.delitem(vars(plugin), name, raising=False)
    plugin.register()
    plugin.register()  # vLLM may load plugins more than once.
    return types.SimpleNamespace(plugin=plugin, engines=engines, trainers=trainers, old=old)


class Server:
    """The worker of vLLM (`gpu_worker.py`), and the client that a trainer reaches it by."""

    def __init__(self, vllm, **checkpoint):
        hf_config = types.SimpleNamespace(**checkpoint)
        model_config = types.SimpleNamespace(is_there=True, hf_config=hf_config)
        vllm_config = types.SimpleNamespace(model_config=model_config, parallel_config=None)
        self.model = Model()
        self.engine = vllm.engines._registry["ckpt_engine"]()(None, vllm_config, torch.device("cpu"), self.model)
        self.active, self.finished = False, 0

    def init_weight_transfer_engine(self, init_info):
        self.engine.init_transfer_engine(self.engine.parse_init_info(init_info))

    def start_weight_update(self):
        assert not self.active
        self.engine.start_weight_update()
        self.active = True

    def update_weights(self, update_info):
        assert self.active
        try:
            self.engine.update_weights(update_info)
        except BaseException:
            self.active = False
            raise

    def finish_weight_update(self):
        assert self.active
        self.engine.finish_weight_update()
        self.active, self.finished = False, self.finished + 1


def model(version):
    return {f"layers.{n}.{part}": torch.full((256, 512), float(version + n)) for n in range(4) for part in "qkv"}


class Source26:
    """vLLM's WeightSource: a fresh pass each round."""

    weights = {}

    def metadata(self):
        raise AssertionError("it may be expensive")

    def __iter__(self):
        for name, tensor in self.weights.items():
            if isinstance(tensor, Exception):
                raise tensor
            yield name, tensor


class Source33:
    weights = {}

    @cached_property
    def metadata(self):
        raise AssertionError("it may be expensive")

    iter_full = Source26.__iter__


@pytest.fixture
def trained(vllm):
    """A trainer and a server, joined through vLLM's own interface."""
    server, source = Server(vllm), Source26() if vllm.old else Source33()
    info = vllm.plugin.TrainerInitInfo(rank=0, workers=1, config=CONFIG)
    first = ("ckpt_engine", None, info) if vllm.old else (info,)
    trainer = vllm.trainers.trainer_init(*first, client=server, source=source)
    yield trainer, server, source
    server.engine.shutdown()
    trainer.shutdown()


def check(server, weights):
    seen = server.model.seen()
    assert all(torch.equal(seen[name], tensor) for name, tensor in weights.items())


def test_a_trainer_of_vllms_own_interface_updates_its_workers(trained):
    trainer, server, source = trained
    for version in (1, 2):
        source.weights = model(version)
        trainer.send_weights()
        check(server, source.weights)
        assert (trainer.version, trainer.report.version) == (version, version)
        assert server.finished == version and not server.active


def test_an_update_whose_source_fails_within_a_layer_is_an_error_and_the_next_one_is_whole(trained):
    trainer, server, source = trained
    source.weights = model(1)
    trainer.send_weights()
    items = list(model(2).items())
    # Two layers, and one of the three weights of the third.
    source.weights = dict([*items[:7], ("layers.2.k", RuntimeError("the shard is gone"))])
    with pytest.raises(ckpt_engine.SourceError, match="the shard is gone"):
        trainer.send_weights()
    assert not server.active and server.finished == 1
    # What it has is of whole layers.
    seen = server.model.seen()
    assert all(len({float(seen[f"layers.{n}.{p}"][0, 0]) for p in "qkv"}) == 1 for n in range(4))
    source.weights = model(3)
    trainer.send_weights()
    check(server, source.weights)


def test_an_update_that_was_begun_and_left_is_forgotten_by_the_next_one(trained):
    trainer, server, source = trained
    server.start_weight_update()
    load(server.model.layers[0], "q", torch.ones(256, 512))
    server.active = False  # Another worker failed.
    source.weights = model(2)
    trainer.send_weights()
    check(server, source.weights)


def test_what_another_trainer_began_before_it_died_is_given_up_by_the_next_one(trained):
    trainer, server, source = trained
    server.start_weight_update()
    load(server.model.layers[0], "q", torch.ones(256, 512))
    for version in (1, 2):
        source.weights = model(version)
        trainer.send_weights()
        check(server, source.weights)
    server.start_weight_update()
    with pytest.raises(AssertionError):
        trainer.send_weights()


def test_a_trainer_that_drives_vllm_itself(vllm):
    server, token = Server(vllm), ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as control:
        joining = in_thread(server.init_weight_transfer_engine, vllm.plugin.init_info(control, token, 2, CONFIG))
        trainer = ckpt_engine.form_group(control, CONFIG, world_size=2)
        joining.result(10)
        server.start_weight_update()
        updating = in_thread(server.update_weights, {"version": 7})
        type(server.engine).trainer_send_weights(model(7).items(), {"engine": trainer, "version": 7})
        updating.result(10)
        server.finish_weight_update()
        check(server, model(7))
        with pytest.raises(ValueError, match="Invalid info"):
            server.engine.update_weights({"names": []})
        server.engine.shutdown()
        trainer.finalize()


def test_trainers_that_do_not_send_take_part_in_the_gathering(vllm):
    source = Source26() if vllm.old else Source33()
    source.weights = model(1)
    gathered = []
    source.__class__ = type("Counted", (type(source),), {
        "__iter__" if vllm.old else "iter_full": lambda self: (gathered.append(n) or (n, t) for n, t in self.weights.items())
    })
    info = vllm.plugin.TrainerInitInfo(rank=1, config=CONFIG)
    first = ("ckpt_engine", None, info) if vllm.old else (info,)
    trainer = vllm.trainers.trainer_init(*first, client=None, source=source)
    trainer.send_weights()
    assert gathered == list(model(1))


def test_workers_that_cannot_join_are_not_waited_for(vllm):
    class Refusing:
        def init_weight_transfer_engine(self, info):
            raise RuntimeError("no such backend")

    info = vllm.plugin.TrainerInitInfo(rank=0, config=CONFIG)
    first = ("ckpt_engine", None, info) if vllm.old else (info,)
    with pytest.raises(RuntimeError, match="no such backend"):
        vllm.trainers.trainer_init(*first, client=Refusing(), source=Source26())


def test_a_model_of_fp8_blocks_gets_no_group_with_a_trainer_that_sends_bf16(vllm):
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    server = Server(vllm, quantization_config=blocks)
    info = vllm.plugin.TrainerInitInfo(rank=0, config=CONFIG)
    first = ("ckpt_engine", None, info) if vllm.old else (info,)
    with pytest.raises(ckpt_engine.MismatchError, match="(?i)fp8"):
        vllm.trainers.trainer_init(*first, client=server, source=Source26())


def test_a_model_in_bf16_gets_no_group_with_a_trainer_that_sends_fp8(vllm):
    info = vllm.plugin.TrainerInitInfo(rank=0, config={**CONFIG, "trainer_quantize_fp8": True})
    first = ("ckpt_engine", None, info) if vllm.old else (info,)
    with pytest.raises(ckpt_engine.MismatchError, match="(?i)fp8"):
        vllm.trainers.trainer_init(*first, client=Server(vllm), source=Source26())


def test_a_worker_whose_loader_fails_tells_the_trainer_and_takes_the_next_update(trained, monkeypatch):
    trainer, server, source = trained

    def load_weights(weights):
        next(weights)
        raise KeyError("layers.0.q is not mine")

    source.weights = model(1)
    with monkeypatch.context() as patch:
        patch.setattr(server.model, "load_weights", load_weights)
        with pytest.raises(ckpt_engine.AbortedError, match="layers.0.q is not mine"):
            trainer.send_weights()
    trainer.send_weights()
    check(server, source.weights)


def test_a_worker_takes_its_own_gpu_and_says_what_its_model_loads(vllm):
    worker_config = vllm.plugin._worker_config
    cuda, blocks = torch.device("cuda", 3), {"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    model_config = types.SimpleNamespace(hf_config=types.SimpleNamespace(quantization_config=blocks))
    config = worker_config({"backend": "ipc", "device": "cuda:0", "trainer_quantize_fp8": True}, cuda, model_config)
    assert config["device"] == "cuda:3"
    assert config["quantization"] == {"accepts": "fp8", "ignored_layers": ["lm_head"]}
    ckpt_engine.check_config(config)
    plain = types.SimpleNamespace(hf_config=types.SimpleNamespace())
    # The trainer has host buckets.
    config = worker_config({"backend": "ipc"}, cuda, plain)
    assert "device" not in config and config["quantization"] == {"accepts": "unquantized"}
    ckpt_engine.check_config(config)


def test_a_worker_that_has_not_joined_says_so(vllm):
    server = Server(vllm)
    server.start_weight_update()
    with pytest.raises(ckpt_engine.StateError, match="init_transfer_engine"):
        server.update_weights({})
