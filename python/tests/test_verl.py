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
import sys
import time
import types

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine


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

    verl = types.ModuleType("verl")
    module = types.ModuleType("verl.checkpoint_engine")
    module.CheckpointEngine = CheckpointEngine
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

    def update_actor(self, global_steps):
        sent = self.engine.send_weights(weights(global_steps, self.drained), global_steps=global_steps)
        return asyncio.run(sent) or {}, self.drained

    def update_rollout(self, global_steps, fails=False):
        generator = self.engine.receive_weights(global_steps=global_steps)
        assert inspect.isasyncgen(generator)

        async def load():
            async for name, tensor in generator:
                if fails:
                    raise RuntimeError("cannot load")
                self.loaded[name] = tensor.clone()

        asyncio.run(load())
        first = next(iter(self.loaded.values()))
        return len(self.loaded), str(first.dtype), float(first.float().mean())


def serve(role, rank, kwargs, pipe):
    worker = Worker(role, rank, kwargs)
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

    def __init__(self, actors, rollouts, **kwargs):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "ranks"])
        self.kwargs = {**KWARGS, **kwargs}
        self.actors = Workers(self.worker("actor", rank) for rank in range(actors))
        self.rollouts = Workers(self.worker("rollout", rank) for rank in range(rollouts))

    def worker(self, role, rank):
        ours, theirs = self.context.Pipe()
        arguments = (role, rank, self.kwargs, theirs)
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

    def update(self, step, fails=()):
        self.build()
        self.actors.start("update_actor", [{"global_steps": step}] * len(self.actors))
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

    def make(*arguments, **keywords):
        managers.append(Manager(*arguments, **keywords))
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
