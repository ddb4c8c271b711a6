"""The weight transfer engine of vLLM, against a stand-in of its base class: the methods that a worker calls, in
its order. A real vLLM runs on a GPU only."""

from __future__ import annotations

import abc
import sys
import types

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine

from ranks import in_thread


class Base(abc.ABC):
    """What vLLM's base class does for an engine."""

    def __init__(self, config, vllm_config, device, model):
        self.config, self.device, self.model = config, device, model
        self.model_config = vllm_config

    def parse(self, cls, values):
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"Invalid info: {error}") from error

    def update_weights(self, update_info):
        self.receive_weights(self.parse(self.update_info_cls, update_info))

    for name in (
        "init_transfer_engine",
        "start_weight_update",
        "finish_weight_update",
        "receive_weights",
        "shutdown",
        "trainer_send_weights",
    ):
        locals()[name] = abc.abstractmethod(lambda self, *arguments: None)


class Model:
    def __init__(self):
        self.log, self.weights = [], {}

    def load_weights(self, weights):
        # As a reload by layers: tensors are kept, and copied when all are there.
        kept = list(weights)
        self.weights = {name: tensor.clone() for name, tensor in kept}


@pytest.fixture
def factory(monkeypatch):
    engines = {}

    class Factory:
        @staticmethod
        def register_engine(name, module, class_name):
            engines[name] = (module, class_name)

    base = types.ModuleType("vllm.distributed.weight_transfer.base")
    base.WeightTransferEngine = Base
    transfer = types.ModuleType("vllm.distributed.weight_transfer")
    transfer.WeightTransferEngineFactory, transfer.base = Factory, base
    reload = types.ModuleType("vllm.model_executor.model_loader.reload")
    reload.initialize_layerwise_reload = lambda model: model.log.append("initialized")
    reload.finalize_layerwise_reload = lambda model, config: model.log.append(("finalized", config))
    for name in ("vllm", "vllm.distributed", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (base, transfer, reload):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    import ckpt_engine.vllm as plugin

    monkeypatch.delitem(vars(plugin), "CkptWeightTransferEngine", raising=False)
    plugin.register()
    module, class_name = engines["ckpt_engine"]
    return plugin, getattr(sys.modules[module], class_name)


def test_a_worker_of_vllm_joins_and_loads_every_version(factory):
    plugin, engine_class = factory
    token = ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as control:
        config = {"backend": "ipc", "update_weights_bucket_megabytes": 1, "timeout_seconds": 10}
        info = plugin.init_info(control, token, 2, config)
        model = Model()
        worker = engine_class(None, "the model's config", "cpu", model)
        joining = in_thread(worker.init_transfer_engine, worker.parse(worker.init_info_cls, info))
        trainer = ckpt_engine.form_group(control, config, world_size=2)
        joining.result(10)
        for version in (1, 2):
            weights = {f"w.{i}": torch.full((512, 256), float(version + i)) for i in range(9)}
            worker.start_weight_update()
            updating = in_thread(worker.update_weights, {"version": version})
            engine_class.trainer_send_weights(weights.items(), {"engine": trainer, "version": version})
            updating.result(10)
            worker.finish_weight_update()
            assert all(torch.equal(model.weights[name], weights[name]) for name in weights)
        assert model.log == ["initialized", ("finalized", "the model's config")] * 2
        with pytest.raises(ValueError, match="Invalid info"):
            worker.update_weights({"names": []})
        worker.shutdown()
        trainer.finalize()


def test_a_worker_that_has_not_joined_says_so(factory):
    worker = factory[1](None, None, "cpu", Model())
    with pytest.raises(ckpt_engine.StateError, match="init_transfer_engine"):
        worker.update_weights({})
