"""verl's own test of checkpoint engines on GPUs, with this package as the backend, beside verl's own engine.

    verl_gpu.py [--trainers N] [--layers N] [--only TITLE]

Needs at least two GPUs, verl 0.9.1 and what it imports, and this package. What runs is the body of
`tests/checkpoint_engine/test_correctness_on_gpu.py` of verl's wheel: FSDP trainers that gather their weights, Ray workers,
verl's manager. Only what it is given is changed: the model (random, because nothing can be fetched there), attention
(the test asks for flash-attn), and the backend. The first runs compare as verl does, in FP32 and by `allclose`; the
others send BF16 and compare bytes. Prints a table; the exit code is 1 if anything was not as it has to be.
"""

import argparse
import functools
import os
import re
import statistics
import sys
import tempfile
import time
import traceback

# Actors do not import the module that a configuration names, as verl's workers do: their class is the test's.
os.environ |= {"VERL_USE_EXTERNAL_MODULES": "ckpt_engine.verl"}

import ray
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.checkpoint_engine import test_correctness_on_gpu as theirs
from tests.checkpoint_engine import test_utils
from verl_cpu import Adapter
from verl.checkpoint_engine import CheckpointEngineManager
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.config import CheckpointEngineConfig

# verl's test makes three updates; each of them is made so many times, of which the last is compared.
REPEATS = 4

MASTER = theirs.CheckpointEngineConfig
FSDP = test_utils.FSDPEngineConfig
MODEL = theirs.HFModelConfig
REPLICAS = theirs.RolloutConfig
ROLLOUT = test_utils.CheckpointEngineWorkerTest


class BytesAdapter(Adapter):
    """Compares byte for byte, FP8 with what it may be off."""

    def check_weights(self):
        if self.model is None:
            self.model = {
                name: weight.cuda()
                for name, weight in AutoModelForCausalLM.from_pretrained(
                    self.model_config.path, dtype=torch.bfloat16
                ).state_dict().items()
            }
        # No update has changed the model.
        count, size, wrong, error = self.compare(0)
        assert not wrong, f"{len(wrong)} of {count} weights differ: {wrong[:3]}"
        self.received_weights = {}
        return count, size, error


class BytesRollout(ROLLOUT):
    def __init__(self, rollout_config, model_config, check_allclose=True, *args, **kwargs):
        super().__init__(rollout_config, model_config, check_allclose, *args, **kwargs)
        self.server_adapter = BytesAdapter(rollout_config, model_config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def check_weights(self):
        count, size, error = self.server_adapter.check_weights()
        print(f"{count} weights are equal, {size / 2**20:.0f} MiB, off by up to {error:.1%} of a block's largest")


class Timed(CheckpointEngineManager):
    """verl's manager, which makes each update some times and keeps their seconds."""

    seconds = []

    async def update_weights(self, global_steps=None):
        for _ in range(REPEATS):
            start = time.perf_counter()
            metrics = await super().update_weights(global_steps)
            Timed.seconds.append(time.perf_counter() - start)
        return metrics


def run(path, backend, bytes_equal, trainers, rollouts, **kwargs):
    """verl's test; the seconds of all its updates."""

    def config(update_weights_bucket_megabytes, **_):
        return MASTER(
            backend=backend,
            custom_backend_module="ckpt_engine.verl" if backend == "ckpt_engine" else None,
            update_weights_bucket_megabytes=update_weights_bucket_megabytes,
            engine_kwargs={backend: dict(kwargs)},
        )

    Timed.seconds = []
    theirs.CheckpointEngineConfig = config
    theirs.CheckpointEngineManager = Timed
    theirs.HFModelConfig = functools.partial(MODEL, override_config={"attn_implementation": "sdpa"})
    # A replica to a GPU; verl's default is two, of which one GPU is none.
    theirs.RolloutConfig = functools.partial(REPLICAS, tensor_model_parallel_size=1)
    test_utils.FSDPEngineConfig = functools.partial(FSDP, model_dtype="bf16") if bytes_equal else FSDP
    test_utils.CheckpointEngineWorkerTest = BytesRollout if bytes_equal else ROLLOUT
    try:
        theirs.test_nccl_checkpoint_engine(
            rebuild_group=False,
            multi_sender=False,
            num_trainer=trainers,
            num_rollout=rollouts,
            num_gpus_per_node=trainers + rollouts,
            model_path=path,
        )
    finally:
        ray.shutdown()
    return Timed.seconds


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trainers", type=int, default=2, help="how many GPUs train")
    arguments.add_argument("--layers", type=int, default=16, help="layers of the model")
    arguments.add_argument("--only", help="the runs whose titles match this pattern")
    arguments = arguments.parse_args()
    trainers = arguments.trainers
    rollouts = torch.cuda.device_count() - trainers
    failed = False
    with tempfile.TemporaryDirectory() as work:
        path = f"{work}/qwen3"
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=32768, hidden_size=2048, intermediate_size=6144, num_hidden_layers=arguments.layers,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device("cuda"):
            model = Qwen3ForCausalLM(config).bfloat16()
        size = sum(weight.nbytes for weight in model.state_dict().values())
        model.save_pretrained(path)
        del model
        torch.cuda.empty_cache()
        print(f"{trainers} trainers, {rollouts} rollouts, {size / 1e9:.2f} GB in BF16", flush=True)
        ours = "ckpt_engine"
        for title, backend, bytes_equal, kwargs in [
            ("verl's nccl, FP32, verl's comparison", "nccl", False, {}),
            ("ours, nccl, FP32, verl's comparison", ours, False, {"transport": "nccl"}),
            ("verl's nccl, BF16, bytes", "nccl", True, {}),
            ("ours, nccl, BF16, bytes", ours, True, {"transport": "nccl"}),
            ("ours, nccl, FP8", ours, True, {"transport": "nccl", "trainer_quantize_fp8": True}),
            ("ours, ipc, BF16, bytes", ours, True, {"transport": "ipc"}),
            ("ours, ipc, FP8", ours, True, {"transport": "ipc", "trainer_quantize_fp8": True}),
        ]:
            if arguments.only and not re.search(arguments.only, title):
                continue
            if backend == ours:
                kwargs = {"device": "cuda", "address": "127.0.0.1", "timeout_seconds": 60, **kwargs}
            try:
                first, *others = run(path, backend, bytes_equal, trainers, rollouts, **kwargs)
                print(f"{title:<40} first {first:6.2f} s, median of {len(others)} {statistics.median(others):.3f} s, "
                      f"fastest {min(others):.3f} s: equal", flush=True)  # fmt: skip
            except Exception:
                failed = True
                print(f"{title}: FAILED\n{traceback.format_exc()[-3000:]}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
