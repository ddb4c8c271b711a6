"""The transport of NeMo-RL's refit, against a strict stand-in of the base class, in threads of this process."""

from __future__ import annotations

import abc
import asyncio
import inspect
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine


@pytest.fixture
def engines(monkeypatch):
    """Makes engines as NeMo-RL does; all of them are closed."""

    class CheckpointEngine(abc.ABC):
        prepare = abc.abstractmethod(lambda self: None)
        init_policy_process_group = abc.abstractmethod(lambda self, **kwargs: None)
        init_rollout_process_group = abc.abstractmethod(lambda self, **kwargs: None)
        send_weights = abc.abstractmethod(lambda self, weights: None)
        receive_weight_batches = abc.abstractmethod(lambda self: None)
        cleanup_after_load = True

        def finalize(self):
            pass

    base = types.ModuleType("nemo_rl.utils.checkpoint_engines.base")
    base.CheckpointEngine = CheckpointEngine
    for name in ("nemo_rl", "nemo_rl.utils", "nemo_rl.utils.checkpoint_engines"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "ckpt_engine.nemo_rl", raising=False)
    from ckpt_engine.nemo_rl import CkptEngine

    made = []

    def make(count):
        config = {"address": "127.0.0.1", "timeout_seconds": 10}
        made.extend(new := [CkptEngine(bucket_size=1 << 20, **config) for _ in range(count)])
        return new

    yield make
    for engine in made:
        engine.close()


def weights(version, drained):
    for i in range(20):
        yield f"layers.{i}.weight", torch.full((64, 96), float(version + i))
    drained.append(version)


async def load(engine, fails=False):
    batches = engine.receive_weight_batches()
    assert inspect.isasyncgen(batches)
    model = {}
    async for batch in batches:
        if fails:
            raise RuntimeError("cannot load")
        model.update((name, tensor.clone()) for name, tensor in batch)
        del batch
    return model


def together(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.exception() or future.result() for future in [pool.submit(call) for call in calls]]


def refit(policies, rollouts, version, drained, **how):
    """What NeMo-RL does around every update: the models, or what was raised."""
    sizes = {"train_world_size": len(policies), "rollout_world_size": len(rollouts)}
    sizes["metadata"] = [engine.prepare() for engine in [*policies, *rollouts]]
    calls = [lambda n=n: policies[n].init_policy_process_group(worker_rank=n, **sizes) for n in range(len(policies))]
    calls += [lambda n=n: rollouts[n].init_rollout_process_group(rollout_rank=n, **sizes) for n in range(len(rollouts))]
    for error in together(calls):
        if error is not None:
            raise error
    calls = [lambda e=engine: asyncio.run(e.send_weights(weights(version, drained))) for engine in policies]
    calls += [lambda e=engine: asyncio.run(load(e, **how)) for engine in rollouts]
    results = together(calls)
    for engine in [*policies, *rollouts]:
        engine.finalize()
    return results[: len(policies)], results[len(policies) :]


def test_every_rollout_gets_every_version_and_the_group_is_kept(engines):
    policies, rollouts, drained, groups = engines(2), engines(2), [], set()
    for version in (1, 2, 3):
        sent, models = refit(policies, rollouts, version, drained)
        assert sent == [None, None]
        for model in models:
            assert list(model) == [f"layers.{i}.weight" for i in range(20)]
            assert all(model[f"layers.{i}.weight"].eq(version + i).all() for i in range(20))
        # Both policy workers have taken part in the gathering.
        assert drained == [each for each in range(1, version + 1) for _ in policies]
        groups.add(rollouts[0]._worker.group)
    assert len(groups) == 1


def test_a_rollout_that_fails_is_an_error_of_the_sender_and_a_new_one_forms_the_group_anew(engines):
    policies, rollouts, drained = engines(2), engines(2), []
    refit(policies, rollouts, 1, drained)
    (failed, other), _ = refit(policies, rollouts, 2, drained, fails=True)
    assert isinstance(failed, ckpt_engine.Error) and "before its end" in str(failed)
    # Who drains only has nothing to say, and the sender has drained as well.
    assert other is None and drained == [1, 1, 2, 2]
    old = rollouts.pop()
    old.close()
    rollouts += engines(1)
    (sent, _), models = refit(policies, rollouts, 3, drained)
    assert sent is None and all(model["layers.0.weight"].eq(3).all() for model in models)
