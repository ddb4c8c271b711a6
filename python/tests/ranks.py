"""Rollouts in processes of their own, which do what a test tells them."""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback

import ckpt_engine

CONFIG = {"backend": "ipc", "update_weights_bucket_megabytes": 1, "timeout_seconds": 10}


class Rollout:
    """What a rollout's process knows."""

    def __init__(self, engine):
        self.engine = engine
        self.model = {}

    def receive(self, version=None, **how):
        """One update, whose tensors are copied to the model; returns the report."""
        how.setdefault("framework", "torch")
        with self.engine.receive_weights(version, **how) as weights:
            for name, tensor in weights:
                self.model[name] = tensor.clone() if hasattr(tensor, "clone") else tensor
        return weights.report

    def receive_buckets(self, version=None, **how):
        """The same, a bucket at a time."""
        with self.engine.receive_weights(version, framework="torch", **how) as weights:
            for bucket in weights.buckets():
                self.model.update((name, tensor.clone()) for name, tensor in bucket)
        return weights.report

    def receive_into(self, version=None, partial=False):
        """The same, into the tensors of the model as they are."""
        destination = self.__dict__.get("destination")
        if destination is None:
            self.destination = destination = ckpt_engine.Destination(self.model, partial=partial)
        return self.engine.receive_into(destination, version)

    def make(self, shapes):
        """Makes the model: zeros, by name the dtype and the shape of each."""
        import torch

        self.model = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shapes.items()}
        self.destination = None

    def receive_async(self, version=None):
        """The same on an event loop."""
        import asyncio

        async def run():
            async with await self.engine.receive_weights_async(version, framework="torch") as weights:
                async for name, tensor in weights:
                    self.model[name] = tensor.clone()
            return weights.report

        return asyncio.run(run())

    def look(self, name):
        """A tensor as (dtype, shape, bytes)."""
        import torch

        tensor = self.model[name]
        return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()

    def names(self):
        return list(self.model)

    def version(self):
        return self.engine.version

    def raise_within(self, pause=0):
        with self.engine.receive_weights() as weights:
            next(weights)
            time.sleep(pause)
            raise RuntimeError("the model does not want it")

    def stop_early(self, pause=0):
        with self.engine.receive_weights() as weights:
            next(weights)
            time.sleep(pause)

    def keep(self, name):
        """One update, of which a tensor is kept in its bucket."""
        with self.engine.receive_weights() as weights:
            self.kept = [tensor for each, tensor in weights if each == name]

    def drop(self):
        del self.kept

    def run(self, function, *arguments):
        """What a test has to do here: a function of its module."""
        return function(self, *arguments)

    def hold_first(self):
        """Takes one tensor and never another."""
        weights = self.engine.receive_weights()
        self.held = (weights, next(weights))
        time.sleep(3600)


def serve(address, token, config, world_size, pipe):
    """A rollout's process: does the calls that come through the pipe."""
    control = ckpt_engine.ControlPlane.join(address, token)
    engine = ckpt_engine.form_group(control, config, world_size=world_size)
    rollout = Rollout(engine)
    pipe.send(control.rank)
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        if call is None:
            engine.finalize()
            control.close()
            return
        method, arguments, keywords = call
        try:
            pipe.send((True, getattr(rollout, method)(*arguments, **keywords)))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, error))


class Remote:
    """A rollout's process, from outside."""

    def __init__(self, process, pipe):
        self.process = process
        self.pipe = pipe
        self.rank = None

    def start(self, method, *arguments, **keywords):
        self.pipe.send((method, arguments, keywords))

    def answer(self, timeout=30):
        assert self.pipe.poll(timeout), "the rollout does not answer"
        fine, value = self.pipe.recv()
        if not fine:
            raise value
        return value

    def call(self, method, *arguments, **keywords):
        self.start(method, *arguments, **keywords)
        return self.answer()

    def kill(self):
        self.process.kill()
        self.process.join()


class Group:
    """A trainer of this process, and its rollouts."""

    def __init__(self, rollouts=1, method="forkserver", theirs=None, **config):
        """Rollouts have the trainer's configuration, but for what `theirs` says."""
        self.config = {**CONFIG, **config}
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            # Imported once, and not by every rollout.
            context.set_forkserver_preload(["torch", "ranks"])
        token = ckpt_engine.generate_token()
        self.rollouts = []
        if method == "fork":
            # Before the engine is used here: its threads do not come along.
            address = f"unix:@ckpt-engine-python-{time.monotonic_ns()}"
        else:
            self.control = ckpt_engine.ControlPlane.lead("127.0.0.1:0", token)
            address = self.control.address
        for _ in range(rollouts):
            ours, end = context.Pipe()
            arguments = (address, token, {**self.config, **(theirs or {})}, rollouts + 1, end)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            end.close()
            self.rollouts.append(Remote(process, ours))
        if method == "fork":
            self.control = ckpt_engine.ControlPlane.lead(address, token)
        self.engine = ckpt_engine.form_group(self.control, self.config, world_size=rollouts + 1)
        for rollout in self.rollouts:
            assert rollout.pipe.poll(60)
            rollout.rank = rollout.pipe.recv()

    def update(self, weights, version, method="receive", **how):
        """One update of all rollouts: the trainer's report."""
        for rollout in self.rollouts:
            rollout.start(method, version, **how)
        report = self.engine.send_weights(weights, version)
        for rollout in self.rollouts:
            assert rollout.answer().version == version
        return report

    def end(self):
        for rollout in self.rollouts:
            if rollout.process.is_alive():
                try:
                    rollout.pipe.send(None)
                    rollout.process.join(5)
                except OSError:
                    pass
                rollout.process.kill()
            rollout.process.join()
        self.engine.finalize()
        self.control.close()


def in_thread(function, *arguments, **keywords):
    """Runs a function beside the test; `result()` waits for it, and raises what it raised."""
    from concurrent.futures import Future

    future = Future()

    def run():
        try:
            future.set_result(function(*arguments, **keywords))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
