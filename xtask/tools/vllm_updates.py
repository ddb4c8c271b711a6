"""Updates a running vLLM from a trainer's process, with small random models.

    vllm_updates.py PROGRAM WORK [--only CASE,CASE] [--timeout S]

PROGRAM is ckpt-engine, WORK an empty folder. Needs GPUs with FP8 (compute capability 8.9 or higher), vLLM and the package
ckpt-engine; nothing is downloaded. Cases run side by side, each on the next GPU; those whose trainer is on another GPU
need two. Prints a line for each check; the exit code is 1 if one failed. WORK/logs has what the processes said.

A case starts vLLM with version 1 of a model and asks it for tokens. Then a trainer's process, through vLLM's own
WeightTransferTrainerFactory,

- sends version 2: the tokens are those of an engine that was started with it;
- fails within version 3: an error in vLLM and in the trainer; vLLM still answers;
- sends version 3: the tokens of a fresh engine;
- dies within version 2: an error in vLLM, which still answers;
- and another trainer's process sends version 2: the tokens of a fresh engine.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
import traceback

import vllm_families as families

VERSIONS = (1, 2, 3)

# name: family, whether in FP8, the transport, whether the trainer has a GPU of its own.
CASES = {
    "dense": ("qwen3", False, "ipc", False),
    "dense_fp8": ("qwen3", True, "ipc", True),
    "experts": ("qwen3_moe", False, "nccl", True),
    "experts_fp8": ("qwen3_moe", True, "ipc", False),
}


def checkpoint(work, family, fp8, version):
    return work / "models" / f"{family}-{version}{'-fp8' if fp8 else ''}"


def prepare(program, work):
    """All checkpoints: in BF16, and in FP8 as the program makes them."""
    for family in sorted({case[0] for case in CASES.values()}):
        for version in VERSIONS:
            folder = checkpoint(work, family, False, version)
            families.make(family, folder, seed=version)
            families.run(program, "quantize", folder, checkpoint(work, family, True, version))


def engine(family, folder):
    from vllm import LLM

    options = families.engine_options(family, folder)
    return LLM(weight_transfer_config={"backend": "ckpt_engine"}, **options)


def fresh(work, family, fp8):
    """The tokens of engines that were started with each version, one after the other."""
    import gc

    import torch
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    for version in VERSIONS:
        llm = engine(family, checkpoint(work, family, fp8, version))
        found = families.greedy(llm, family)
        (work / "results" / f"fresh-{family}-{fp8}-{version}.json").write_text(json.dumps(found))
        print(f"fresh {family} {'FP8' if fp8 else 'BF16'} {version}: {found[0][:8]}", flush=True)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        torch.cuda.empty_cache()


class Client:
    """vLLM's weight synchronisation client, over a pipe to the process that has the engine."""

    def __init__(self, pipe):
        self.pipe = pipe

    def call(self, method, *arguments):
        self.pipe.send(("call", method, arguments))
        failed = self.pipe.recv()
        if failed is not None:
            raise RuntimeError(failed)

    def init_weight_transfer_engine(self, init_info):
        self.call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self):
        self.call("start_weight_update")

    def update_weights(self, update_info):
        self.call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version=None):
        self.call("finish_weight_update")


def make_source():
    """A source of vLLM's kind in either version: 0.33 iterates with `iter_full`."""
    from vllm.distributed.weight_transfer import WeightSource

    class Source(WeightSource):
        metadata = None
        weights, stop_at, how = {}, None, None

        def __init__(self):
            pass

        def iter_full(self):
            for number, (name, tensor) in enumerate(self.weights.items()):
                if number == self.stop_at:
                    if self.how == "die":
                        time.sleep(1)  # Until vLLM receives.
                        os.kill(os.getpid(), 9)
                    raise RuntimeError("the trainer's shard is gone")
                yield name, tensor

        __iter__ = iter_full

    return Source()


def trainer(pipe, work, family, config):
    """A trainer's process: sends versions as it is told."""
    import torch

    device = torch.device(config["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    import ckpt_engine.vllm as plugin

    plugin.register()
    source = make_source()
    models = {}
    for version in VERSIONS:
        files = sorted(checkpoint(work, family, False, version).glob("*.safetensors"))
        models[version] = {name: t.to(device) for file in files for name, t in load_file(file).items()}
    pipe.send(("ready",))
    pipe.recv()
    info = plugin.TrainerInitInfo(rank=0, workers=1, config=config)
    options = dict(client=Client(pipe), source=source)
    try:
        engine = WeightTransferTrainerFactory.trainer_init(info, **options)
    except TypeError:  # vLLM 0.26
        engine = WeightTransferTrainerFactory.trainer_init(plugin.BACKEND, None, info, **options)
    pipe.send(("done", None))
    while (command := pipe.recv()) is not None:
        version, source.how = command
        source.weights = models[version]
        source.stop_at = len(source.weights) * 2 // 3 if source.how else None
        began = time.perf_counter()
        try:
            engine.send_weights()
            metrics = {"seconds": time.perf_counter() - began, "tensors": engine.report.counts.tensors}
            pipe.send(("done", metrics))
        except Exception as error:
            traceback.print_exc()
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
    engine.shutdown()


class Case:
    def __init__(self, name, work):
        self.name, self.work = name, work
        self.family, self.fp8, self.transport, apart = CASES[name]
        self.config = {
            "backend": self.transport, "device": f"cuda:{int(apart)}", "timeout_seconds": 30,
            "update_weights_bucket_megabytes": 4, "trainer_quantize_fp8": self.fp8,
        }
        self.failed = 0

    def check(self, what, good, more=""):
        self.failed += not good
        print(f"{'OK  ' if good else 'FAIL'} {self.name}: {what} {more}".rstrip(), flush=True)

    def start(self):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self.work, self.family, self.config)
        process = context.Process(target=trainer, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def join(self, pipe):
        assert pipe.recv() == ("ready",)
        return self.tell(pipe, "join")

    def tell(self, pipe, command):
        """Has the trainer do something, and does what it asks of vLLM meanwhile: how it ended, and errors of vLLM."""
        pipe.send(command)
        errors = []
        while True:
            try:
                kind, *rest = pipe.recv()
            except (EOFError, ConnectionResetError):
                return "died", None, errors
            if kind != "call":
                return kind, rest[0], errors
            method, arguments = rest
            failed = None
            try:
                getattr(self.llm, method)(*arguments)
            except Exception as error:
                traceback.print_exc()
                failed = f"{type(error).__name__}: {error}"
                errors.append(failed)
            try:
                pipe.send(failed)
            except OSError:
                return "died", None, errors

    def compare(self, what, version):
        file = self.work / "results" / f"fresh-{self.family}-{self.fp8}-{version}.json"
        end = time.time() + 200
        while not file.exists() and time.time() < end:
            time.sleep(0.5)
        time.sleep(0.2)
        found, expected = families.greedy(self.llm, self.family), json.loads(file.read_text())
        pairs = [a == b for x, y in zip(found, expected) for a, b in zip(x, y)]
        self.check(f"{what}: the tokens of a fresh engine", found == expected, f"{sum(pairs)} of {len(pairs)}")

    def run(self):
        process, pipe = self.start()
        self.llm = engine(self.family, checkpoint(self.work, self.family, self.fp8, 1))
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        self.check("vLLM found the plugin by itself", "ckpt_engine" in WeightTransferEngineFactory._registry)
        first = families.greedy(self.llm, self.family)
        kind, _, errors = self.join(pipe)
        self.check(f"the worker joined over {self.transport}", kind == "done" and not errors, str(errors)[:300])
        for _ in range(2):
            kind, metrics, errors = self.tell(pipe, (2, None))
            self.check("version 2 was loaded", kind == "done" and not errors, f"{metrics} {errors}"[:300])
        self.check("the tokens changed", families.greedy(self.llm, self.family) != first)
        self.compare("version 2", 2)
        kind, said, errors = self.tell(pipe, (3, "raise"))
        self.check("a trainer that fails within version 3 is told", kind == "failed" and "shard is gone" in said, str(said)[:300])
        self.check("and so is vLLM", len(errors) == 1 and "shard is gone" in errors[0], str(errors)[:300])
        self.check("vLLM still answers", len(families.greedy(self.llm, self.family)) > 0)
        kind, metrics, errors = self.tell(pipe, (3, None))
        self.check("version 3 was loaded after that", kind == "done" and not errors, f"{metrics} {errors}"[:300])
        self.compare("version 3", 3)
        began = time.time()
        kind, _, errors = self.tell(pipe, (2, "die"))
        took = f"after {time.time() - began:.1f} s: {errors}"[:400]
        self.check("a trainer that dies is an error in vLLM", kind == "died" and len(errors) == 1, took)
        self.check("vLLM still answers", len(families.greedy(self.llm, self.family)) > 0)
        process.join(5)
        process, pipe = self.start()
        kind, _, errors = self.join(pipe)
        self.check("the worker joined another trainer", kind == "done" and not errors, str(errors)[:300])
        kind, metrics, errors = self.tell(pipe, (2, None))
        self.check("version 2 was loaded from it", kind == "done" and not errors, f"{metrics} {errors}"[:300])
        self.compare("version 2 again", 2)
        pipe.send(None)
        process.join(10)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--timeout", type=int, default=300, help="seconds for all cases together")
    parser.add_argument("--one", help="used by the program itself")
    parser.add_argument("--fresh", help="used by the program itself")
    options = parser.parse_args()
    os.environ.update({key: value for key, value in families.ENVIRONMENT.items() if key not in os.environ})
    if options.one or options.fresh:
        code = 1
        try:
            if options.one:
                case = Case(options.one, options.work)
                case.run()
                code = int(case.failed > 0)
            else:
                family, fp8 = options.fresh.split(",")
                fresh(options.work, family, fp8 == "fp8")
                code = 0
        except BaseException as error:
            traceback.print_exc()
            print(f"FAIL {options.one or 'fresh ' + options.fresh}: it ended: {type(error).__name__}: {error}"[:400], flush=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # Threads of the engine may be left, which would keep the process.
    program = shutil.which(options.program) or options.program
    for folder in ("results", "logs", "models"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    began = time.time()
    prepare(program, options.work)
    print(f"models made after {time.time() - began:.0f} s", flush=True)
    names = [name for name in options.only.split(",") if name]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        gpus = [str(number) for number in range(max(1, listed.count("GPU ")))]
    jobs = [["--one", name] for name in names]
    kinds = sorted({CASES[name][:2] for name in names})
    jobs += [["--fresh", f"{family},{'fp8' if fp8 else 'bf16'}"] for family, fp8 in kinds]

    def job(number, arguments):
        pair = [gpus[number % len(gpus)], gpus[(number + 1) % len(gpus)]]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(pair))}
        log = options.work / "logs" / f"{'-'.join(arguments)[2:].replace(',', '-')}.log"
        command = [sys.executable, os.path.abspath(__file__), program, str(options.work), *arguments]
        with open(log, "w") as out:
            try:
                left = options.timeout - (time.time() - began)
                return subprocess.run(command, stdout=out, stderr=out, env=environment, timeout=left).returncode, log
            except subprocess.TimeoutExpired:
                return "too long", log

    failed = False
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        running = {pool.submit(job, number, arguments): arguments for number, arguments in enumerate(jobs)}
        for done in concurrent.futures.as_completed(running):
            code, log = done.result()
            lines = log.read_text(errors="replace").splitlines()
            for line in lines:
                if line.startswith(("OK  ", "FAIL", "fresh ")):
                    print(line)
            print(f"{' '.join(running[done])}: exit {code} after {time.time() - began:.0f} s", flush=True)
            failed |= code != 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
