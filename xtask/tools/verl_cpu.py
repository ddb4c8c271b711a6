"""Runs the package as a backend of the real verl, on the CPU: its manager, its workers and Ray, nothing stood in for.

    verl_cpu.py TRANSPORT ...

Two trainers hold a small random Qwen3 in halves (FSDP2 over gloo) and two rollouts receive it. Prints a table; the
exit code is 1 if anything was not as it has to be.

Ours are the trainer, because verl registers its FSDP engine for CUDA and NPUs alone, and what a rollout does with the
weights, because its inference engines need a GPU. Without gathering, what exports the shards and hands them over is verl's: the method of its
FSDP engine, told that the device is the CPU, and that of its worker.
"""

import asyncio
import os
import signal
import sys
import tempfile
import threading
import time
import types
from importlib.metadata import version

# Failures are a part of this; what is said of them is printed below. verl knows no CPU, and warns that it takes it for
# a GPU's.
os.environ |= {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VERL_LOGGING_LEVEL": "ERROR",
}

import ray
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.checkpoint_engine.test_utils import MockReplica, MockServerAdapter
from verl.checkpoint_engine import CheckpointEngineManager, CheckpointEngineRegistry, CheckpointEngineWorker
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.single_controller.ray.base import split_resource_pool
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.import_utils import import_external_libs, load_class_from_fqn
from verl.workers.config import CheckpointEngineConfig, HFModelConfig, RolloutConfig

BACKEND, MODULE = "ckpt_engine", "ckpt_engine.verl"
TRAINERS, ROLLOUTS, SPARES = 2, 2, 2
UPDATES, BUCKET_MB = 5, 16
# What a dead process is noticed by is its connection; this bounds the test if that does not happen.
TIMEOUT = 20


def weight_of(step, start):
    """A weight after `step` updates of the trainer: the same bytes whether computed on a part or the whole."""
    return start * (1 + step / 64)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


class Trainer(Worker):
    """An actor as verl's is: `update_weights` gives the engine a generator whose items are collectives of all."""

    def __init__(self, path, config):
        super().__init__()
        initialize_global_process_group_ray(backend="cpu:gloo")
        self.model = load(path)
        mesh = init_device_mesh("cpu", (self.world_size,))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.start = {name: p.to_local().clone() for name, p in self.model.state_dict().items()}
        self.heard = None
        kwargs = config.engine_kwargs.get(config.backend, {})
        self.gathers = kwargs.get("gather", True)
        if not self.gathers:
            self.actor = types.SimpleNamespace(engine=self.exporting())
        import_external_libs(config.custom_backend_module)
        self.checkpoint_engine = CheckpointEngineRegistry.new(
            config.backend,
            is_master=self.rank == 0,
            bucket_size=config.update_weights_bucket_megabytes << 20,
            **kwargs,
        )

    def exporting(self):
        """verl's training engine around the model, as far as it exports shards."""
        from verl.workers.engine.fsdp import FSDPEngine, transformer_impl

        transformer_impl.get_device_id = lambda: "cpu"
        engine = FSDPEngine.__new__(FSDPEngine)
        engine.module = self.model
        engine._uses_fsdp2_cpu_offload_policy = engine._is_offload_param = engine._qat_enabled = False
        engine.model_config = types.SimpleNamespace(hf_config=self.model.config)
        return engine

    async def send(self, params, global_steps, mode):
        if self.gathers:
            weights = ((name, param.full_tensor()) for name, param in params.items())
            return await self.checkpoint_engine.send_weights(weights, global_steps=global_steps)
        from verl.workers.engine_workers import ActorRolloutRefWorker

        return await ActorRolloutRefWorker.update_weights(self, global_steps=global_steps, mode=mode)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps=None, mode="auto"):
        params = self.model.state_dict()
        for name, param in params.items():
            param.to_local().copy_(weight_of(global_steps, self.start[name]))
        self.heard = None
        try:
            metrics = await self.send(params, global_steps, mode) or {}
            self.heard = f"nothing: it ended, with {metrics.get('checkpoint_engine/rollouts', 0):.0f} rollouts"
            return metrics
        except Exception as error:
            self.heard = f"{type(error).__name__}: {error}"
            raise

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method, *args, **kwargs):
        return getattr(self.checkpoint_engine, method)(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def what_it_heard(self):
        return self.heard


class Adapter(MockServerAdapter):
    """Keeps what arrives, and compares it byte for byte, where verl's asks `torch.allclose`."""

    trouble = None

    async def update_weights(self, weights, **kwargs):
        self.received_weights = {}
        async for name, weight in weights:
            self.received_weights[name] = weight.clone()
            if self.trouble == "slow":
                time.sleep(0.2)
            if self.trouble == "raises" and len(self.received_weights) == 50:
                raise RuntimeError("cannot load")

    def compare(self, step):
        """How many weights arrived, their bytes, the names of those that are wrong, and the largest FP8 error."""
        if self.model is None:
            self.model = load(self.model_config.path).state_dict()
        received, wrong, error = dict(self.received_weights), [], 0.0
        size = sum(tensor.nbytes for tensor in received.values())
        for name, start in self.model.items():
            weight, got = weight_of(step, start), received.pop(name, None)
            if got is not None and got.dtype == torch.float8_e4m3fn:
                scale = received.pop(f"{name}_scale_inv")
                scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: got.shape[0], : got.shape[1]]
                difference = (got.float() * scale - weight.float()).abs()
                # Of a block's largest, half a step of E4M3's coarsest codes is 16/448.
                error = max(error, float((difference / (scale * 448)).max()))
                fine = error <= 16 / 448 + 1e-6
            else:
                fine = got is not None and got.dtype == weight.dtype and got.shape == weight.shape
                fine = fine and torch.equal(got.view(torch.uint8), weight.view(torch.uint8))
            if not fine:
                wrong.append(name)
        return len(self.model), size, wrong + list(received), error


class Rollout(CheckpointEngineWorker):
    def __init__(self, rollout_config, model_config):
        super().__init__(rollout_config, model_config, Adapter(rollout_config, model_config))
        self.heard = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps=None):
        self.heard = None
        try:
            await super().update_weights(global_steps=global_steps)
            self.heard = "nothing: it has all weights"
        except Exception as error:
            self.heard = f"{type(error).__name__}: {error}"
            raise

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def compare(self, step):
        return self.server_adapter.compare(step)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def process(self):
        return os.getpid()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def have(self, trouble):
        self.server_adapter.trouble = trouble

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def what_it_heard(self):
        return self.heard


class Run:
    """A group of workers, and what was seen of it."""

    def __init__(self, path, **kwargs):
        kwargs = {"address": "127.0.0.1", "timeout_seconds": TIMEOUT, **kwargs}
        self.is_fp8 = kwargs.get("trainer_quantize_fp8", False)
        config = CheckpointEngineConfig(
            backend=BACKEND,
            custom_backend_module=MODULE,
            update_weights_bucket_megabytes=BUCKET_MB,
            engine_kwargs={BACKEND: kwargs},
        )
        self.model = HFModelConfig(path=str(path))
        self.rollout_config = RolloutConfig(
            name="vllm", tensor_model_parallel_size=1, checkpoint_engine=config
        )
        pool = RayResourcePool([TRAINERS + ROLLOUTS + SPARES], use_gpu=False, max_colocate_count=1)
        trainers, rollouts, *self.spares = split_resource_pool(pool, [TRAINERS, ROLLOUTS] + [1] * SPARES)
        trainer = RayClassWithInitArgs(cls=ray.remote(Trainer), path=str(path), config=config)
        self.actors = RayWorkerGroup(resource_pool=trainers, ray_cls_with_init=trainer)
        self.groups, self.replicas = [], []
        manager = CheckpointEngineManager
        if not kwargs.get("gather", True):
            # As verl's trainer does for `checkpoint_manager_class`.
            manager = load_class_from_fqn("ckpt_engine.verl.ShardManager", "CheckpointEngineManager")
        self.manager = manager(config=config, actor_wg=self.actors, replicas=[])
        self.start(rollouts)
        ray.get([worker.what_it_heard.remote() for worker in self.actors.workers])
        self.step = 0

    def start(self, pool):
        """Rollout workers, one to a replica, which the manager is told of by its own means."""
        cls = RayClassWithInitArgs(
            cls=ray.remote(Rollout), rollout_config=self.rollout_config, model_config=self.model
        )
        group = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=cls)
        replicas = [MockReplica(rank, self.rollout_config, self.model) for rank in range(group.world_size)]
        for replica in replicas:
            asyncio.run(replica.init_hybrid(group))
        ray.get([worker.process.remote() for worker in group.workers])
        self.manager.add_replicas(replicas)
        self.groups.append(group)
        self.replicas.extend(replicas)

    def rollouts(self):
        return [worker for replica in self.replicas for worker in replica.workers]

    def update(self):
        """An update, and what all rollouts say of it: its seconds, metrics, bytes and the largest FP8 error."""
        self.step += 1
        start = time.perf_counter()
        metrics = self.manager.update_weights(global_steps=self.step)
        seconds = time.perf_counter() - start
        workers = self.rollouts()
        answers = ray.get([worker.compare.remote(self.step) for worker in workers])
        for rank, (_, _, wrong, _) in enumerate(answers):
            assert not wrong, f"update {self.step}, rollout {rank}: {len(wrong)} weights differ: {wrong[:3]}"
        assert metrics["checkpoint_engine/version"] == self.step, metrics
        assert metrics["checkpoint_engine/rollouts"] == len(workers), metrics
        return seconds, metrics, answers[0][1], max(answer[3] for answer in answers)

    def fails(self, row, title, trouble):
        """An update that the last rollout fails: what is seen on each side, and that the next one works."""
        replica = self.replicas[-1]
        *others, worker = self.rollouts()
        pid = ray.get(worker.process.remote())
        ray.get(worker.have.remote(trouble))
        if trouble == "slow":
            threading.Timer(1.5, os.kill, (pid, signal.SIGKILL)).start()
        elif trouble is None:
            os.kill(pid, signal.SIGKILL)
            time.sleep(1)
        self.step += 1
        start = time.perf_counter()
        try:
            self.manager.update_weights(global_steps=self.step)
        except Exception as error:
            seconds = time.perf_counter() - start
            row(title, seconds, f"the manager raises {type(error).__name__}")
        else:
            raise AssertionError(f"update {self.step} had a rollout that failed, and succeeded")
        assert seconds < TIMEOUT, f"it took {seconds:.0f} s to notice"
        for name, side in (("trainer", self.actors.workers[0]), ("other rollout", others[0])):
            # The manager goes on at the first error, before the others are through.
            while not (heard := ray.get(side.what_it_heard.remote())) and trouble:
                assert time.perf_counter() - start < TIMEOUT, f"the {name} is not told"
                time.sleep(0.05)
            row(f"  what the {name} has heard", None, heard if trouble else "nothing: it had not begun")
        if trouble == "raises":
            ray.get(worker.have.remote(None))
        else:
            # The manager's own way; starting the successor is its embedder's.
            self.manager.remove_replicas([replica])
            self.replicas.remove(replica)
            self.start(self.spares.pop())
        seconds, metrics, size, error = self.update()
        row("  the next update", seconds, said(metrics, size, error, self.is_fp8))

    def end(self):
        for group in (self.actors, *self.groups):
            for worker in group.workers:
                ray.kill(worker)


def said(metrics, size, error, is_fp8):
    count, rollouts = (int(metrics[f"checkpoint_engine/{name}"]) for name in ("tensors", "rollouts"))
    words = f"{count} weights, {size / 2**20:.0f} MiB, {rollouts} rollouts"
    if not is_fp8:
        return f"{words}, equal"
    quantized = int(metrics["checkpoint_engine/converted"])
    assert quantized > 0 and error > 0, f"{quantized} weights were quantised"
    return f"{words}, {quantized} as FP8, off by up to {error:.1%} of a block's largest"


def main(transports):
    with tempfile.TemporaryDirectory() as work:
        table(work, transports)
        ray.shutdown()


def table(work, transports):
    path = f"{work}/qwen3"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(path)
    # So many only in name: a bundle of a worker group takes one.
    ray.init(
        num_cpus=64, include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=f"{work}/ray"
    )

    def row(what, seconds, result):
        print(f"{what:<46} {'' if seconds is None else f'{seconds:.2f} s':>8}  {result}", flush=True)

    print("\n" + ", ".join(f"{name} {version(name)}" for name in ("verl", "ray", "torch", "transformers")))
    # Starting workers takes most of the time. So one transport has the weights as they are, and the other one quantises them.
    for gather in (True, False):
        for transport, is_fp8 in ((transports[0], False), (transports[-1], True)):
            name = ", ".join([transport] + ["FP8"] * is_fp8 + ["shards"] * (not gather))
            run = Run(path, transport=transport, gather=gather, trainer_quantize_fp8=is_fp8)
            for i in range(UPDATES):
                seconds, metrics, size, error = run.update()
                row(f"{name}: update {i + 1}", seconds, said(metrics, size, error, is_fp8))
            if gather:
                run.fails(row, f"{name}: a rollout's load raises", "raises")
            run.fails(row, f"{name}: a rollout killed between updates", None)
            if gather:
                run.fails(row, f"{name}: a rollout killed within an update", "slow")
            run.end()
    print("\nmetrics of the last:")
    for key, value in sorted(metrics.items()):
        print(f"  {key} {value:.6g}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["ipc"])
