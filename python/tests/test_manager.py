"""The manager, over engines of this process."""

import asyncio

import numpy
import pytest

import ckpt_engine

# Nothing here waits for a deadline: a test would take longer than it may.
CONFIG = {"backend": "naive", "timeout_seconds": 300}


def model(value):
    return {f"w.{i}": numpy.full((4, 4), value + i, dtype=numpy.float32) for i in range(5)}


class Server(ckpt_engine.LocalRollout):
    """A rollout that notes what is asked of it, by plain methods."""

    def __init__(self, engine, log):
        self.log, self.weights, self.fails = log, {}, None
        super().__init__(engine, self.load, framework="numpy")

    def load(self, weights):
        for name, tensor in weights:
            self.weights[name] = tensor.copy()
        if self.fails == "load":
            raise ValueError("the model has no w.4")

    def note(self, what):
        self.log.append(what)
        if self.fails == what:
            raise ValueError(f"{what} is not possible")

    def pause(self):
        self.note("pause")

    def release_cache(self):
        self.note("release")

    def update(self, version):
        self.note("update")
        return super().update(version)

    def resume(self, active):
        self.note(f"resume {active}")


class Remote(ckpt_engine.RolloutWorker):
    """The same by coroutines, as calls of actors are."""

    def __init__(self, server):
        self.server = server

    async def pause(self):
        await asyncio.to_thread(self.server.pause)

    async def release_cache(self):
        await asyncio.to_thread(self.server.release_cache)

    async def update(self, version):
        return await asyncio.to_thread(self.server.update, version)

    async def resume(self, active):
        await asyncio.to_thread(self.server.resume, active)

    async def finalize(self):
        await asyncio.to_thread(self.server.finalize)


@pytest.fixture(params=["plain", "async"])
def group(request):
    trainer, rollouts = ckpt_engine.form_local_group(CONFIG, rollouts=2)
    log = []
    servers = [Server(engine, log) for engine in rollouts]
    workers = servers if request.param == "plain" else [Remote(server) for server in servers]
    manager = ckpt_engine.Manager(trainer, workers)
    yield manager, servers, log
    manager.finalize()


def test_all_are_paused_before_a_cache_goes_and_resumed_with_the_version_that_all_have(group):
    manager, servers, log = group
    for version in (1, 2):
        sent, received = manager.update_weights(model(version), version)
        assert sent.version == version and [report.version for report in received] == [version, version]
        assert log == ["pause"] * 2 + ["release"] * 2 + ["update"] * 2 + [f"resume {version}"] * 2
        assert all((server.weights["w.3"] == version + 3).all() for server in servers)
        log.clear()


@pytest.mark.parametrize("fails", ["pause", "release", "update", "load"])
def test_whatever_fails_all_are_resumed_with_the_version_before_and_the_next_update_works(group, fails):
    manager, servers, log = group
    manager.update_weights(model(1), 1)
    servers[1].fails = fails
    with pytest.raises((ckpt_engine.Error, ValueError)) as failed:
        manager.update_weights(model(2), 2)
    words = "no w.4" if fails == "load" else f"{fails} is not possible"
    assert words in str(failed.value)
    assert log[-2:] == ["resume None"] * 2
    servers[1].fails = None
    manager.update_weights(model(3), 3)
    assert log[-2:] == ["resume 3"] * 2
    assert all((server.weights["w.0"] == 3).all() for server in servers)


def test_the_trainers_own_failure_is_the_one_that_is_raised(group):
    manager, _, log = group

    def weights():
        yield "w.0", numpy.zeros(3, dtype=numpy.float32)
        raise KeyError("the shard of w.1")

    with pytest.raises(ckpt_engine.SourceError, match="the shard of w.1"):
        manager.update_weights(weights(), 1)
    assert log[-2:] == ["resume None"] * 2
    manager.update_weights(model(2), 2)


def test_a_task_that_is_cancelled_resumes_all_and_the_next_update_works(group):
    manager, _, log = group

    async def cancelled():
        async def slow():
            yield "w.0", numpy.zeros(3, dtype=numpy.float32)
            await asyncio.sleep(30)

        task = asyncio.create_task(manager.update_weights_async(slow(), 1))
        while "update" not in log:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log[-2:] == ["resume None"] * 2
        await manager.update_weights_async(model(2), 2)

    asyncio.run(cancelled())


def test_a_plain_method_may_return_what_is_awaited(group):
    manager, servers, _ = group

    class Reference(ckpt_engine.RolloutWorker):
        def __init__(self, worker):
            self.worker = worker

        def update(self, version):
            return asyncio.to_thread(self.worker.update, version)

        def finalize(self):
            self.worker.finalize()

    manager.rollouts = [Reference(server) for server in servers]
    manager.update_weights(model(7), 7)
    assert (servers[0].weights["w.0"] == 7).all()


def test_there_are_more_rollouts_than_a_pool_has_threads():
    trainer, rollouts = ckpt_engine.form_local_group(CONFIG, rollouts=70)
    weights = model(0)
    targets = [{name: numpy.zeros_like(tensor) for name, tensor in weights.items()} for _ in rollouts]
    workers = [
        ckpt_engine.LocalRollout(engine, ckpt_engine.Destination(target)) for engine, target in zip(rollouts, targets)
    ]
    manager = ckpt_engine.Manager(trainer, workers)
    manager.update_weights(model(5), 5)
    assert all((target["w.1"] == 6).all() for target in targets)
    manager.finalize()
