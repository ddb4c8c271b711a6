"""The backend of verl, against a strict stand-in of the classes that it builds upon.

The stand-in does what verl 0.9.1 does around every update, in its order: `prepare` on all workers, metadata of the
actors first, lists of exactly the size of each worker group, one call for each worker, `finalize` after it.
"""

from __future__ import annotations

import abc
import asyncio
import functools
import inspect
import multiprocessing
import os
import socket
import sys
import time
import types

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine

from ranks import in_thread
from test_processes import as_seen

NIXL = "CKPT_ENGINE_NIXL_DIR" in os.environ


@functools.cache
def stand_in() -> types.ModuleType:
    """The part of `verl.checkpoint_engine` that a backend sees."""

    class CheckpointEngine(abc.ABC):
        wire_format = "named_tensors"
        prepare = abc.abstractmethod(lambda self: None)
        build_topology = classmethod(abc.abstractmethod(lambda cls, *arguments: None))
        init_process_group = abc.abstractmethod(lambda self, **kwargs: None)
        finalize = abc.abstractmethod(lambda self: None)
        send_weights = abc.abstractmethod(lambda self, weights, global_steps=None: None)
        receive_weights = abc.abstractmethod(lambda self, global_steps=None: None)

    class CheckpointEngineRegistry:
        classes: dict[str, type] = {}

        @classmethod
        def register(cls, backend):
            return lambda made: cls.classes.setdefault(backend, made)

        @classmethod
        def new(cls, backend, *arguments, **keywords):
            return cls.classes[backend](*arguments, **keywords)

    class CheckpointEngineManager:
        def __init__(self, config, actor_wg, replicas):
            self.backend = config.backend
            self.backend_cls = CheckpointEngineRegistry.classes[config.backend]

    verl = types.ModuleType("verl")
    module = types.ModuleType("verl.checkpoint_engine")
    module.CheckpointEngine = CheckpointEngine
    module.CheckpointEngineManager = CheckpointEngineManager
    module.CheckpointEngineRegistry = CheckpointEngineRegistry
    verl.checkpoint_engine = module
    sys.modules.update({"verl": verl, "verl.checkpoint_engine": module})
    import ckpt_engine.verl  # noqa: F401 - as custom_backend_module does

    return module


KWARGS = {"address": "127.0.0.1", "timeout_seconds": 10}


def weights(step, drained):
    for i in range(20):
        yield f"model.layers.{i}.mlp.down_proj.weight", torch.full((128, 128), float(step)).bfloat16()
    drained.append(step)


class Worker:
    """An actor or a rollout worker, in its process."""

    def __init__(self, role, rank, kwargs):
        new = stand_in().CheckpointEngineRegistry.new
        # As verl does: a rollout's engine is not told `is_master`.
        if role == "actor":
            self.engine = new("ckpt_engine", is_master=rank == 0, bucket_size=4 << 20, **kwargs)
        else:
            self.engine = new("ckpt_engine", bucket_size=4 << 20, **kwargs)
        self.drained, self.loaded = [], {}

    def execute(self, method, **kwargs):
        return getattr(self.engine, method)(**kwargs)

    def group(self):
        return self.engine._worker.group

    def run(self, function):
        return function(self)

    def update_actor(self, global_steps):
        sent = self.engine.send_weights(weights(global_steps, self.drained), global_steps=global_steps)
        return asyncio.run(sent) or {}, self.drained

    def update_rollout(self, global_steps, fails=False):
        generator = self.engine.receive_weights(global_steps=global_steps)
        assert inspect.isasyncgen(generator)
        self.loaded = {}

        async def load():
            async for name, tensor in generator:
                if fails:
                    raise RuntimeError("cannot load")
                self.loaded[name] = tensor.clone()

        asyncio.run(load())
        first = next(iter(self.loaded.values()))
        return len(self.loaded), str(first.dtype), float(first.float().mean())


def serve(cls, role, rank, kwargs, pipe):
    worker = cls(role, rank, kwargs)
    while True:
        try:
            method, keywords = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(worker, method)(**keywords)))
        except Exception as error:
            pipe.send((False, error if isinstance(error, ckpt_engine.Error) else RuntimeError(repr(error))))


class Workers(list):
    """A worker group: calls all at once."""

    def start(self, method, keywords):
        for (_, pipe), each in zip(self, keywords, strict=True):
            pipe.send((method, each))

    def answers(self):
        answers = []
        for _, pipe in self:
            assert pipe.poll(40), "a worker does not answer"
            answers.append(pipe.recv())
        return answers


def raised(answers):
    for fine, value in answers:
        if not fine:
            raise value
    return [value for _, value in answers]


class Manager:
    """What verl's manager does."""

    actor = Worker

    def __init__(self, actors, rollouts, **kwargs):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "ranks"])
        self.kwargs = {**KWARGS, **kwargs}
        self.actors = Workers(self.worker("actor", rank) for rank in range(actors))
        self.rollouts = Workers(self.worker("rollout", rank) for rank in range(rollouts))

    def worker(self, role, rank):
        ours, theirs = self.context.Pipe()
        arguments = (self.actor if role == "actor" else Worker, role, rank, self.kwargs, theirs)
        process = self.context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def all(self, method, actors, rollouts):
        self.actors.start(method, actors)
        self.rollouts.start(method, rollouts)
        return raised(self.actors.answers() + self.rollouts.answers())

    def build(self):
        each = [{"method": "prepare"}]
        sizes = len(self.actors), len(self.rollouts)
        metadata = self.all("execute", each * sizes[0], each * sizes[1])
        topology = stand_in().CheckpointEngineRegistry.classes["ckpt_engine"].build_topology(*sizes, metadata)
        calls = []
        for kwargs, size in zip(topology, sizes, strict=True):
            assert all(len(values) == size for values in kwargs.values())
            kwargs["method"] = ["init_process_group"] * size
            calls.append([{key: kwargs[key][i] for key in kwargs} for i in range(size)])
        self.all("execute", *calls)

    def update(self, step, fails=(), **how):
        self.build()
        self.actors.start("update_actor", [{"global_steps": step, **how}] * len(self.actors))
        rollouts = [{"global_steps": step, "fails": i in fails} for i in range(len(self.rollouts))]
        self.rollouts.start("update_rollout", rollouts)
        actors, rollouts = self.actors.answers(), self.rollouts.answers()
        actors, rollouts = raised(actors), raised(rollouts)
        each = [{"method": "finalize"}]
        self.all("execute", each * len(self.actors), each * len(self.rollouts))
        return actors, rollouts

    def groups(self):
        return set(self.all("group", [{}] * len(self.actors), [{}] * len(self.rollouts)))

    def end(self):
        for process, pipe in self.actors + self.rollouts:
            pipe.close()
            process.join(5)
            process.kill()


@pytest.fixture
def manager():
    managers = []

    def make(*arguments, kind=Manager, **keywords):
        managers.append(kind(*arguments, **keywords))
        return managers[-1]

    yield make
    for each in managers:
        each.end()


def test_updates_reach_all_rollouts_and_the_group_is_kept(manager):
    manager = manager(actors=2, rollouts=2)
    groups = None
    for step in (10, 11, 12):
        actors, rollouts = manager.update(step)
        (metrics, drained), (nothing, drained_too) = actors
        assert metrics["checkpoint_engine/version"] == step
        assert metrics["checkpoint_engine/tensors"] == 20
        assert metrics["checkpoint_engine/rollouts"] == 2
        assert nothing == {} and drained[-1] == drained_too[-1] == step
        assert rollouts == [(20, "torch.bfloat16", float(step))] * 2
        groups = groups or manager.groups()
        assert manager.groups() == groups and len(groups) == 2, "one group, and the actor that is in none"


def test_rollouts_get_fp8_where_the_trainer_is_asked_to_quantise(manager):
    manager = manager(actors=1, rollouts=1, trainer_quantize_fp8=True)
    ((metrics, _),), (loaded,) = manager.update(1)
    assert metrics["checkpoint_engine/converted"] == 20
    assert loaded[:2] == (40, "torch.float8_e4m3fn")


def test_an_update_that_a_rollout_fails_is_an_error_drains_the_actors_and_the_next_one_works(manager):
    manager = manager(actors=2, rollouts=2)
    manager.update(1)
    with pytest.raises(ckpt_engine.AbortedError, match="left the update before its end"):
        manager.update(2, fails={1})
    (_, drained), (_, drained_too) = manager.update(3)[0]
    assert drained == drained_too == [1, 2, 3]


def test_a_rollout_that_was_replaced_forms_the_group_anew(manager):
    manager = manager(actors=1, rollouts=2)
    manager.update(1)
    before = manager.groups()
    process, _ = manager.rollouts[1]
    process.kill()
    process.join()
    manager.rollouts[1] = manager.worker("rollout", 1)
    time.sleep(0.5)
    assert [step for *_, step in manager.update(2)[1]] == [2.0, 2.0]
    assert manager.groups().isdisjoint(before)
    # One more, and one fewer.
    manager.rollouts.append(manager.worker("rollout", 2))
    assert len(manager.update(3)[1]) == 3
    manager.rollouts.pop()[0].kill()
    assert len(manager.update(4)[1]) == 2


def test_keys_that_nobody_knows_are_errors():
    new = stand_in().CheckpointEngineRegistry.new
    with pytest.raises(ckpt_engine.ConfigError, match="bakend"):
        new("ckpt_engine", bucket_size=1 << 20, bakend="ipc")


# Actors that hold parts of the weights, without gathering.

#: By name the dtype, the shape, and the dimension that is cut between two actors; none of one that both have.
SHARDED = {
    "model.embed_tokens.weight": ("bfloat16", (384, 160), 0),
    "model.layers.0.mlp.down_proj.weight": ("bfloat16", (300, 256), 0),
    "model.layers.0.mlp.up_proj.weight": ("bfloat16", (256, 384), 1),
    "model.layers.0.self_attn.q_proj.weight": ("bfloat16", (256, 256), None),
    "model.layers.0.input_layernorm.weight": ("bfloat16", (255,), 0),
    "model.layers.0.one": ("float32", (1, 7), 0),
    "model.layers.0.scalar": ("float32", (), None),
    "model.layers.1.mlp.experts.gate_up_proj": ("bfloat16", (3, 512, 128), 0),
    "model.layers.1.mlp.experts.down_proj": ("bfloat16", (3, 128, 256), 1),
}


def full(step, names=tuple(SHARDED)):
    """The whole weights of a version, in which no two elements near each other are equal."""
    made = {}
    for name in names:
        dtype, shape, _ = SHARDED[name]
        generator = torch.Generator().manual_seed(step * 7919 + sum(name.encode()))
        made[name] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    return made


def of_checkpoint(weights):
    """The same with every expert's matrices by themselves, as checkpoints and verl's whole weights have them."""
    apart = {}
    for name, weight in weights.items():
        base, last = name.rsplit(".", 1)
        if last == "gate_up_proj":
            for i, expert in enumerate(weight):
                apart[f"{base}.{i}.gate_proj.weight"], apart[f"{base}.{i}.up_proj.weight"] = expert.chunk(2)
        elif last == "down_proj":
            apart.update((f"{base}.{i}.down_proj.weight", expert) for i, expert in enumerate(weight))
        else:
            apart[name] = weight
    return apart


class Spec:
    """What verl says of a shard."""

    place = to_hf_chunk = hf_slots = None

    def __init__(self, weight, converts):
        self.full_shape = tuple(weight.shape)
        self.mesh = getattr(weight, "device_mesh", None)
        self.placements = getattr(weight, "placements", None)
        if converts:
            self.to_hf_chunk = lambda start, rows: []


class TrainingEngine:
    """What verl's training engine gives of its shards: their elements, flat, and how they lie in the whole."""

    def __init__(self, weights, converts):
        self.weights, self.converts = weights, converts

    def get_per_tensor_param_shard(self):
        def shards():
            for name, weight in self.weights.items():
                local = weight.to_local() if hasattr(weight, "to_local") else weight
                yield name, local.reshape(-1), Spec(weight, name == self.converts)

        return shards(), None

    def get_per_tensor_param(self):
        return ((name, weight.full_tensor()) for name, weight in self.weights.items()), None


class ShardActor(Worker):
    """An actor of a mesh of two, which gives its shards in one of the ways that there are."""

    def mesh(self, rank, port):
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
        dist.init_process_group("gloo", rank=rank, world_size=2)
        self.device_mesh = init_device_mesh("cpu", (2,))
        # What the first of all takes seconds for on a busy machine, rollouts need not wait for.
        from torch.distributed.tensor import Shard, distribute_tensor

        distribute_tensor(torch.zeros(2), self.device_mesh, [Shard(0)]).full_tensor()

    def fsdp(self, step):
        """A module of PyTorch's FSDP2, whose parameters it has cut itself."""
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(step)
        module = torch.nn.Sequential(torch.nn.Linear(130, 257), torch.nn.Linear(257, 3, bias=False)).bfloat16()
        fully_shard(module, mesh=self.device_mesh)
        return dict(module.state_dict())

    def sharded(self, step, names):
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        weights = full(step, names)
        for name, weight in weights.items():
            cut = SHARDED[name][2]
            if name.endswith("norm.weight") or cut is not None:
                placement = Replicate() if cut is None else Shard(cut)
                weights[name] = distribute_tensor(weight, self.device_mesh, [placement])
        return weights

    def update_actor(self, global_steps, gives="engine", names=tuple(SHARDED), converts=None):
        if gives == "fsdp":
            weights = self.fsdp(global_steps)
        else:
            weights = self.sharded(global_steps, names)
            if gives == "engine":
                weights = TrainingEngine(weights, converts)
            elif gives == "generator":
                weights = (pair for pair in weights.items())
            elif gives == "other":
                weights = {"a": weights["model.layers.0.scalar"], "odd": ckpt_engine.Tensor(b"1234", "U8", (4,))}
        sent = self.engine.send_weights(weights, global_steps=global_steps)
        return asyncio.run(sent) or {}, self.drained


def looked_at(worker):
    """All that a rollout has loaded, as (dtype, shape, bytes)."""
    return {name: as_seen(tensor) for name, tensor in worker.loaded.items()}


class ShardManager(Manager):
    """Two actors, each with its shards."""

    actor = ShardActor

    def __init__(self, rollouts=1, **kwargs):
        super().__init__(2, rollouts, **{"gather": False, **kwargs})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.actors.start("mesh", [{"rank": rank, "port": port} for rank in (0, 1)])
        raised(self.actors.answers())

    def seen(self):
        self.rollouts.start("run", [{"function": looked_at}] * len(self.rollouts))
        return raised(self.rollouts.answers())


@pytest.fixture
def shards(manager):
    def make(*arguments, **keywords):
        return manager(*arguments, kind=ShardManager, **keywords)

    return make


TRANSPORTS = [
    "ipc",
    pytest.param("nixl", marks=pytest.mark.skipif(not NIXL, reason="CKPT_ENGINE_NIXL_DIR does not name NIXL")),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_gathering_rollouts_get_every_element_of_what_the_actors_hold_in_parts(shards, transport):
    manager = shards(rollouts=2, transport=transport)
    groups = None
    for step in (1, 2, 3):
        (metrics, _), (nothing, _) = manager.update(step)[0]
        expected = {name: as_seen(weight) for name, weight in of_checkpoint(full(step)).items()}
        assert manager.seen() == [expected] * 2
        assert metrics["checkpoint_engine/version"] == step and nothing == {}
        assert metrics["checkpoint_engine/tensors"] == len(expected)
        groups = groups or manager.groups()
        assert manager.groups() == groups and len(groups) == 1, "all actors are in the one group, which is kept"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_gathering_blocks_that_two_actors_hold_parts_of_are_quantised_as_those_of_whole_weights(
    shards, transport
):
    manager = shards(transport=transport, trainer_quantize_fp8=True)
    host, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "trainer_quantize_fp8": True})
    for step in (1, 2):
        (metrics, _), _ = manager.update(step)[0]
        receiving = in_thread(lambda: dict(rollout.receive_weights(framework="torch", copy=True)))
        host.send_weights({name: weight.contiguous() for name, weight in of_checkpoint(full(step)).items()}, step)
        expected = {name: as_seen(weight) for name, weight in receiving.result(10).items()}
        quantized = [name for name, (dtype, *_) in expected.items() if dtype == "torch.float8_e4m3fn"]
        assert len(quantized) == metrics["checkpoint_engine/converted"] == 12
        assert manager.seen() == [expected]


def test_without_gathering_actors_may_give_the_parameters_of_a_module_that_is_sharded_by_pytorch(shards):
    manager = shards()
    for step in (1, 2):
        manager.update(step, gives="fsdp")
        torch.manual_seed(step)
        module = torch.nn.Sequential(torch.nn.Linear(130, 257), torch.nn.Linear(257, 3, bias=False)).bfloat16()
        assert manager.seen() == [{name: as_seen(weight) for name, weight in module.state_dict().items()}]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"gives": "generator"}, "ckpt_engine.verl.ShardManager"),
        ({"gives": "other"}, "neither a whole tensor nor a DTensor"),
        ({"converts": "model.layers.0.mlp.up_proj.weight"}, "verl converts it"),
    ],
)
def test_without_gathering_weights_that_are_no_parts_are_an_error_of_all_and_the_next_update_works(shards, how, words):
    manager = shards(rollouts=2)
    # Before the group is formed, and after it.
    for step in (1, 3):
        manager.build()
        start = time.monotonic()
        manager.actors.start("update_actor", [{"global_steps": step}, {"global_steps": step, **how}])
        manager.rollouts.start("update_rollout", [{"global_steps": step}] * 2)
        answers = [value for fine, value in manager.actors.answers() + manager.rollouts.answers() if not fine]
        assert len(answers) == 4 and time.monotonic() - start < KWARGS["timeout_seconds"]
        for error in answers:
            assert isinstance(error, ckpt_engine.Error) and words in str(error), error
        manager.update(step + 1)
        expected = {name: as_seen(weight) for name, weight in of_checkpoint(full(step + 1)).items()}
        assert manager.seen() == [expected] * 2


def test_without_gathering_weights_with_other_names_are_refused_once_and_then_taken(shards):
    manager = shards()
    manager.update(1)
    fewer = tuple(SHARDED)[:4]
    with pytest.raises(ckpt_engine.MismatchError, match="another name, type or shape"):
        manager.update(2, names=fewer)
    manager.update(3, names=fewer)
    assert manager.seen() == [{name: as_seen(weight) for name, weight in full(3, fewer).items()}]


def test_a_rollout_that_has_no_memory_to_lend_is_an_error_of_all_at_once_and_names_it(shards):
    manager = shards(rollouts=2)
    manager.kwargs["device"] = "cuda:99"
    process, _ = manager.rollouts[1]
    process.kill()
    manager.rollouts[1] = manager.worker("rollout", 1)
    del manager.kwargs["device"]
    start = time.monotonic()
    manager.build()
    manager.actors.start("update_actor", [{"global_steps": 1}] * 2)
    manager.rollouts.start("update_rollout", [{"global_steps": 1}] * 2)
    answers = manager.actors.answers() + manager.rollouts.answers()
    assert time.monotonic() - start < KWARGS["timeout_seconds"] and not any(fine for fine, _ in answers)
    for _, error in answers[:3]:
        assert isinstance(error, ckpt_engine.AbortedError) and error.rank == 3 and "CUDA" in str(error)
    assert "CUDA" in str(answers[3][1])


def test_actors_that_are_asked_for_their_training_engine_gather_where_that_is_configured(shards):
    manager = shards(gather=True)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    manager.update(1, names=names)
    assert manager.seen() == [{name: as_seen(weight) for name, weight in full(1, names).items()}]


def test_without_gathering_a_rollout_that_was_replaced_lends_tensors_too(shards):
    manager = shards(rollouts=2)
    manager.update(1)
    process, _ = manager.rollouts[1]
    process.kill()
    process.join()
    manager.rollouts[1] = manager.worker("rollout", 1)
    time.sleep(0.5)
    manager.update(2)
    expected = {name: as_seen(weight) for name, weight in of_checkpoint(full(2)).items()}
    assert manager.seen() == [expected] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transport": "dir"}, "`dir` cannot write parts of weights.*`ipc`, `nixl` and `nccl`"),
        ({"delta": True}, "delta"),
        ({"quantization": {"quantize_on_receive": True}}, "cannot quantise"),
        ({"gather": "no"}, "true or false"),
    ],
)
def test_without_gathering_options_that_cannot_be_had_are_errors_where_the_worker_starts(options, words):
    new = stand_in().CheckpointEngineRegistry.new
    with pytest.raises(ckpt_engine.ConfigError, match=words):
        new("ckpt_engine", bucket_size=1 << 20, **{"gather": False, **options})


def test_a_rollout_that_lends_nothing_beside_actors_that_do_not_gather_is_an_error():
    new = stand_in().CheckpointEngineRegistry.new
    actor = new("ckpt_engine", bucket_size=1 << 20, is_master=True, gather=False, address="127.0.0.1")
    rollout = new("ckpt_engine", bucket_size=1 << 20)
    with pytest.raises(ValueError, match="`gather` is False on the master.*another rollout worker"):
        type(actor).build_topology(1, 1, [actor.prepare(), rollout.prepare()])
    actor.close()


def test_the_manager_of_shards_has_actors_give_their_training_engine():
    stand_in()
    from ckpt_engine.verl import ShardManager

    classes = stand_in().CheckpointEngineRegistry.classes
    classes.setdefault("naive", object)
    for backend, mode in (("ckpt_engine", "delta_sharded"), ("naive", "naive")):
        manager = ShardManager(types.SimpleNamespace(backend=backend), actor_wg=None, replicas=[])
        assert (manager.backend, manager.backend_cls) == (mode, classes[backend])
