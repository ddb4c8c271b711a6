"""Servers that receive with vLLM's and SGLang's own code: for the backends `vllm` and `sglang`, on a machine with a GPU where
the servers as a whole do not fit.

    python3 xtask/tools/server_receiver.py vllm SOURCES --transport nccl --port 8000 --device cuda:1 --out DIR
    python3 xtask/tools/server_receiver.py sglang SOURCES --transport ipc --port 8000 --device cuda:0 --out DIR

SOURCES is a folder with the sources of vLLM or SGLang (a wheel that was unpacked). Of these, what receives is used: vLLM's
weight transfer engines with their packing and communicator; SGLang's weight updater with its buckets, its process group and its
unpickler. All else is left out, and instead of a model there is a dictionary. The routes, what is active when, and what an
error looks like are those of vLLM 0.33 and SGLang 0.5.23. When an update is finished, all weights are written to
DIR/model.safetensors, to be compared with `ckpt-engine verify`.

With `--transport zmq` and `--moonshot SOURCES`, the sources of Moonshot's checkpoint-engine, its own worker receives, as an extension of
either server has it; that takes pyzmq.

All of it, one case after the other, with a line for each that says what came of it:

    python3 xtask/tools/server_receiver.py all PROGRAM --vllm SOURCES --sglang SOURCES [--moonshot SOURCES] [--generate] --work DIR

With `--model CHECKPOINT` (and with `--generate`, for all its cases) vLLM is not left out: the one that is installed serves the
checkpoint and generates, and only what receives is that of SOURCES, because the routes are those of vLLM 0.33, and an older one
may be all that a machine can run. The models are small and random, two versions each, dense and with experts, in BF16 and in FP8
blocks that the trainer makes; after an update from the first to the second, greedy tokens have to be those of a server that
was started with the second.

The trainer is on cuda:0. With two GPUs or more, receivers over NCCL are on cuda:1; with one they are on the trainer's, which
takes NCCL 2.30 or later on both sides, NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL_NVLS_ENABLE=0.

vLLM takes the library that VLLM_NCCL_SO_PATH names. vLLM 0.33 loads none before 2.29.7, which lacks ncclCommSuspend; these
functions are not used here, so an older one (PyTorch 2.11 brings it) is made to do, and it is said.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
import types
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

REAL = {
    "vllm.distributed.weight_transfer.base",
    "vllm.distributed.weight_transfer.ipc_engine",
    "vllm.distributed.weight_transfer.nccl_common",
    "vllm.distributed.weight_transfer.nccl_engine",
    "vllm.distributed.weight_transfer.packed_tensor",
    "vllm.distributed.device_communicators.pynccl",
    "vllm.distributed.device_communicators.pynccl_wrapper",
    "vllm.utils.nccl",
    "sglang.srt.model_executor.model_runner_components.weight_updater",
    "sglang.srt.utils.patch_torch",
    "sglang.srt.weight_sync.tensor_bucket",
}
# What is taken out of files of SGLang that as a whole import everything.
PARTS = {
    "sglang.srt.utils.common": {
        "MultiprocessingSerializer",
        "SafeUnpickler",
        "_safe_load_torch_storage",
        "init_custom_process_group",
    },
    "sglang.srt.utils.network": {"NetworkAddress", "_is_ipv6", "_wrap"},
}


class Whatever(type):
    """Of a class that stands for any other: it has every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Anything(metaclass=Whatever):
    """Stands for whatever is imported and not used here."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args, **kwargs):
        return Anything()

    def __bool__(self):
        return False


class Logger(logging.getLoggerClass()):
    def __getattr__(self, name):
        if name.endswith("_once"):
            return getattr(self, name.removesuffix("_once"))
        raise AttributeError(name)


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is REAL in a folder. All else of these packages is a stand-in; or, beside one that is installed, what it lacks."""

    def __init__(self, folder, stands_in):
        self.folder, self.stands_in = folder, stands_in

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("vllm", "sglang"):
            return None
        if name in REAL:
            file = os.path.join(self.folder, *name.split(".")) + ".py"
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if self.stands_in(name) else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        module.__path__ = []
        match module.__name__:
            case "vllm.envs":
                module.VLLM_NCCL_SO_PATH = os.environ.get("VLLM_NCCL_SO_PATH")
                module.VLLM_DISABLE_PYNCCL = False
                module.VLLM_USE_NCCL_SYMM_MEM = False
                module.VLLM_ALLOW_INSECURE_SERIALIZATION = True
            case "vllm":
                module.envs = importlib.import_module("vllm.envs")
            case "vllm.logger":
                module.init_logger = Logger
            case "vllm.platforms":
                module.current_platform = Anything()
            case "vllm.utils.torch_utils":
                module.current_stream = torch.cuda.current_stream
            case "vllm.model_executor.model_loader.mtp_validation":
                module.disable_mtp_completeness_check = contextlib.nullcontext
            case "sglang.srt.utils.common" | "sglang.srt.utils":
                self.parts(module, "sglang.srt.utils.common")
            case "sglang.srt.utils.network":
                self.parts(module, "sglang.srt.utils.network")
            case "sglang.srt.runtime_context":
                module.get_model = lambda: types.SimpleNamespace(weight_cache_mode="off")
                module.get_parallel = lambda: types.SimpleNamespace(tp_rank=0)

    def parts(self, module, source):
        """SGLang's own definitions of what is used, and nothing else of the file."""
        import dataclasses
        import io
        import ipaddress
        import pickle
        import socket
        import typing
        from multiprocessing.reduction import ForkingPickler

        import pybase64

        release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        vars(module).update(io=io, pickle=pickle, ForkingPickler=ForkingPickler, pybase64=pybase64, torch=torch,
                            torch_release=release, is_npu=lambda: False, dataclass=dataclasses.dataclass, ipaddress=ipaddress,
                            socket=socket, Optional=typing.Optional, Tuple=typing.Tuple, Union=typing.Union)
        file = os.path.join(self.folder, *source.split(".")) + ".py"
        with open(file) as text:
            tree = ast.parse(text.read(), file)
        future = [node for node in tree.body if getattr(node, "module", None) == "__future__"]
        tree.body = future + [node for node in tree.body if getattr(node, "name", None) in PARTS[source]]
        exec(compile(tree, file, "exec"), vars(module))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tensors = {}

    def load_weights(self, weights):
        for name, tensor in weights:
            self.tensors[name] = tensor.clone()


NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3",
         "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "uint8": "U8", "int8": "I8", "bool": "BOOL"}


def write(tensors, folder):
    os.makedirs(folder, exist_ok=True)
    header, parts, at = {}, [], 0
    for name, tensor in sorted(tensors.items()):
        part = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
        dtype = NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(parts)


def moonshot(folder):
    """What Moonshot's own worker receives with, of a folder with the sources of checkpoint-engine; not the rest of its package."""
    if not folder:
        return None
    package = types.ModuleType("checkpoint_engine")
    package.__path__ = [os.path.join(folder, "checkpoint_engine")]
    sys.modules["checkpoint_engine"] = package
    try:
        import loguru  # noqa: F401
    except ImportError:
        sys.modules["loguru"] = types.SimpleNamespace(logger=logging.getLogger("checkpoint_engine"))
    import zmq
    from checkpoint_engine.worker import update_weights_from_ipc

    def update(model, addresses, device):
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        if gpu not in addresses:
            raise RuntimeError(f"Device UUID {gpu} not found in zmq_handles: {list(addresses)}")
        update_weights_from_ipc(zmq.Context.instance(), addresses[gpu], device.index or 0, run=model.load_weights)

    return update


class Vllm:
    """One worker, as vLLM's gpu_worker drives its engine."""

    moonshot = None

    def __init__(self, transport, device, out):
        if transport == "zmq":
            Engine = Anything
        elif transport == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine as Engine

            make_do()
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine as Engine
        self.active, self.version, self.device, self.out = False, "default", device, out
        self.model, config = self.load()
        self.engine = Engine(None, config, device, self.model)

    def load(self):
        """A model, and vLLM's configuration."""
        parallel = types.SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        return Model(), types.SimpleNamespace(parallel_config=parallel, model_config=None)

    def call(self, path, body):
        match path:
            case "/health":
                return {}
            case "/version":
                return {"version": "0.33.0"}
            case "/get_world_size":
                return {"world_size": 1}
            case "/weight_info":
                return {"weight_version": self.version}
            case "/init_weight_transfer_engine":
                self.engine.init_transfer_engine(self.engine.parse_init_info(body["init_info"]))
            case "/shutdown_weight_transfer_engine":
                if self.active:
                    raise RuntimeError("Cannot release a trainer connection during a weight update")
                self.engine.shutdown()
            case "/start_weight_update":
                if self.active:
                    raise RuntimeError("start_weight_update called while a weight update is already active.")
                self.engine.start_weight_update()
                self.active = True
            case "/update_weights":
                if not self.active:
                    raise RuntimeError("start_weight_update must be called before update_weights.")
                try:
                    self.engine.update_weights(body["update_info"])
                except BaseException:
                    self.active = False
                    raise
            case "/finish_weight_update":
                if not self.active:
                    raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
                self.engine.finish_weight_update()
                self.active = False
                self.version = (body or {}).get("weight_version") or self.version
                if self.out:
                    write(self.model.tensors, self.out)
            case "/collective_rpc":
                if not self.moonshot or body["method"] != "update_weights_from_ipc":
                    raise NotImplementedError(f"Method {body['method']!r} is not implemented.")
                self.moonshot(self.model, body["args"][0], self.device)
            case "/update_weight_version":
                self.version = body["new_version"]
                if self.out:
                    write(self.model.tensors, self.out)
            case "/pause" | "/resume":
                pass
            case _:
                return None
        return {"message": "done"}

    def error(self, error):
        causes = f"{error}" + (f" ({error.__cause__})" if error.__cause__ else "")
        words = f"Call to collective_rpc method failed: {causes}"
        return 500, {"error": {"message": words, "type": type(error).__name__, "code": 500}}


class WholeVllm(Vllm):
    """The vLLM that is installed, in this process, with the engines of SOURCES as what receives."""

    def __init__(self, transport, device, model):
        import vllm_families as families
        from vllm import LLM

        self.families, self.family = families, os.path.basename(model).split("-")[0]
        self.llm = LLM(**families.engine_options(self.family, model))
        # It has imported its own by now, and does not use them.
        for name in REAL & set(sys.modules):
            del sys.modules[name]
        super().__init__(transport, device, None)

    def load(self):
        return self.llm.collective_rpc(lambda worker: (worker.model_runner.get_model(), worker.vllm_config))[0]

    def call(self, path, body):
        if path == "/generate":
            return {"tokens": self.families.greedy(self.llm, self.family)}
        return super().call(path, body)


def make_do():
    """Takes from vLLM's wrapper what an older NCCL lacks and nothing here uses."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.utils.nccl import find_nccl_library

    try:
        library = ctypes.CDLL(find_nccl_library())
    except OSError as error:
        return print(f"NCCL: {error}; VLLM_NCCL_SO_PATH names its file", flush=True)
    version = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(version))
    unused = {"ncclCommSuspend", "ncclCommResume"}
    lacks = {name for name in unused if not hasattr(library, name)}
    functions = [function for function in NCCLLibrary.exported_functions if function.name not in lacks]
    NCCLLibrary.exported_functions = functions
    print(f"NCCL {version.value}" + (f" without {', '.join(sorted(lacks))}" if lacks else ""), flush=True)


class Refused(Exception):
    pass


class Sglang:
    """One worker, as SGLang's scheduler drives its updater."""

    moonshot = None

    def __init__(self, transport, device, out):
        del transport
        from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        # The group of the server's own workers, without which none is made with others.
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        monkey_patch_torch_reductions()
        self.deserialize = MultiprocessingSerializer.deserialize
        self.active, self.version, self.device, self.out = False, "default", device, out
        self.model = Model()
        self.updater = WeightUpdater(
            tp_rank=0, device=str(device), gpu_id=device.index or 0, model_config=None, custom_weight_loaders={},
            get_model=lambda: self.model, update_model_fields=None, recapture_cuda_graph=None, get_model_runner=None)

    def call(self, path, body):
        updater = self.updater
        done = True, "Success"
        match path:
            case "/model_info":
                return {"weight_version": self.version}
            case "/server_info":
                return {"version": "0.5.23", "tp_size": 1, "dp_size": 1, "pp_size": 1, "weight_cache_mode": "off"}
            case "/pause_generation" | "/continue_generation" | "/flush_cache":
                pass
            case "/init_weights_update_group":
                done = updater.init_weights_update_group(**body)
            case "/destroy_weights_update_group":
                done = updater.destroy_weights_update_group(body["group_name"])
            case "/begin_weight_update":
                done = not self.active, "a weight-update session is already open; call end_weight_update() first"
                if not self.active:
                    updater.begin_weight_update()
                self.active = True
            case "/end_weight_update":
                done = self.active, "no weight-update session is open; call begin_weight_update() first"
                if self.active:
                    updater.end_weight_update(run_post_load=False)
                self.active = False
            case "/update_weight_version":
                self.version = body["new_version"]
                if self.out:
                    write(self.model.tensors, self.out)
            case "/update_weights_from_ipc":
                try:
                    if not self.moonshot:
                        raise ImportError("checkpoint-engine is not installed.")
                    self.moonshot(self.model, body["zmq_handles"], self.device)
                except Exception as error:
                    done = False, str(error)
            case "/update_weights_from_distributed" | "/update_weights_from_tensor" if not self.active:
                done = False, f"{path[1:]} must run between begin_weight_update() and end_weight_update()"
            case "/update_weights_from_distributed":
                keys = ["names", "dtypes", "shapes", "group_name", "load_format"]
                weights = updater.receive_weights_from_distributed(**{key: body[key] for key in keys})
                done = updater.load_weights_from_distributed(weights)
            case "/update_weights_from_tensor":
                bucket = self.deserialize(body["serialized_named_tensors"][0])
                done = updater.update_weights_from_tensor(bucket, load_format=body["load_format"])
            case _:
                return None
        if not done[0]:
            raise Refused(done[1])
        return {"success": True, "message": done[1]}

    def error(self, error):
        return 400 if isinstance(error, Refused) else 500, {"success": False, "message": str(error)}


def handler(worker, device):
    # An engine does one thing at a time.
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def say(self, status, answer):
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                with lock:
                    if device.type == "cuda":
                        torch.cuda.set_device(device)
                    answer = worker.call(self.path.split("?")[0], json.loads(text) if text else None)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
            except Exception as error:
                return self.say(*worker.error(error))
            if answer is None:
                return self.say(404, {"detail": "Not Found"})
            self.say(200, answer)

    return Handler


def serve(args):
    if args.model:
        import vllm_families as families

        os.environ.update({key: value for key, value in families.ENVIRONMENT.items() if key not in os.environ})
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        torch.cuda.set_device(args.device)
        finder = Finder(args.sources, lambda name: name.endswith(".mtp_validation"))
        worker = lambda: WholeVllm(args.transport, args.device, args.model)
        import vllm.distributed.weight_transfer  # noqa: F401  its own first: what follows replaces parts of it
        import vllm.v1.worker.gpu_worker  # noqa: F401
    else:
        finder = Finder(args.sources, lambda name: True)
        worker = lambda: {"vllm": Vllm, "sglang": Sglang}[args.what](args.transport, args.device, args.out)
    sys.meta_path.insert(0, finder)
    try:
        import pybase64  # noqa: F401
    except ImportError:
        import base64

        sys.modules["pybase64"] = base64
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    worker = worker()
    worker.moonshot = moonshot(args.moonshot)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), handler(worker, args.device))
    print("ready", flush=True)
    server.serve_forever()


def run(command, log, limit):
    print("+", *command, file=log, flush=True)
    try:
        return subprocess.run(command, stdout=log, stderr=log, timeout=limit).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class Receiver:
    """A process of this program that serves; ended with the block."""

    def __init__(self, log, kind, port, *arguments, gpus=None):
        self.url, route = f"http://127.0.0.1:{port}", {"vllm": "/health", "sglang": "/model_info"}[kind]
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})}
        command = [sys.executable, __file__, kind, *arguments, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.route = route

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def wait(self, limit):
        """What keeps it from serving, if something does."""
        until = time.monotonic() + limit
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + self.route, timeout=2).close()
                return None
            if time.monotonic() > until:
                return "the receiver does not start"
            time.sleep(0.3)
        return "the receiver has ended"

    def tokens(self):
        request = urllib.request.Request(self.url + "/generate", b"{}", {"content-type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=100))["tokens"]


def case(args, model, kind, transport, fp8, unpacked, port):
    """One server, three updates, and every byte of what it has."""
    name = f"{kind}-{transport}" + ("-unpacked" if unpacked else "") + ("-fp8" if fp8 else "")
    out = os.path.join(args.work, name)
    device = "cuda:1" if transport == "nccl" and torch.cuda.device_count() > 1 else "cuda:0"
    options = [getattr(args, kind), "--transport", transport, "--device", device, "--out", out]
    options += ["--moonshot", args.moonshot] if transport == "zmq" else []
    with open(os.path.join(args.work, name + ".log"), "w") as log, Receiver(log, kind, port, *options) as server:
        if failed := server.wait(60):
            return name, failed
        steps = [
            ("doctor", ["doctor", "--server", server.url]),
            ("sync", ["sync", "--backend", kind, "--device", "cuda:0", "--server", server.url, "--model", model, "--updates",
                      "3", "--json", "--engine-kwarg", f"transport={transport}",
                      *(["--engine-kwarg", "unpacked=true"] if unpacked else [])]),
            ("verify", ["verify", model, out]),
        ]
        # The doctor asks servers of vLLM how their own engines are configured, of which this transport needs none.
        for step, arguments in steps[1 if transport == "zmq" else 0 :]:
            if not run([args.program, *arguments], log, 120):
                return name, f"{step} failed"
        return name, "OK"


def generating(args, family, transport, fp8, number):
    """A vLLM that generates, updated from a first version to a second; and one that was started with the second."""
    name = f"generate-{family}-{transport}" + ("-fp8" if fp8 else "")
    first, second = (os.path.join(args.work, f"{family}-{version}" + ("-fp8" if fp8 else "")) for version in (1, 2))
    count = torch.cuda.device_count()
    # vLLM takes the first GPU that it sees: over NCCL that is not the trainer's.
    trainer, other = str(number % count), str((number + 1) % count)
    gpus = trainer if transport == "ipc" else other
    options = [args.vllm, "--transport", transport, "--device", "cuda:0", "--model"]
    port = 18100 + 2 * number
    with (open(os.path.join(args.work, name + ".log"), "w") as log, open(os.path.join(args.work, name + "-fresh.log"), "w") as other,
          Receiver(log, "vllm", port, *options, first, gpus=gpus) as server,
          Receiver(other, "vllm", port + 1, *options, second, gpus=gpus) as fresh):
        if failed := server.wait(200) or fresh.wait(200):
            return name, failed
        before, expected = server.tokens(), fresh.tokens()
        if before == expected:
            return name, "both versions generate the same"
        sync = ["env", f"CUDA_VISIBLE_DEVICES={trainer}", args.program, "sync", "--backend", "vllm", "--device", "cuda:0", "--server",
                server.url, "--model", os.path.join(args.work, f"{family}-2"), "--updates", "3", "--json", "--engine-kwarg",
                f"transport={transport}", *(["--trainer-quantize-fp8"] if fp8 else [])]
        if not run(sync, log, 100):
            return name, "sync failed"
        found = server.tokens()
        pairs = [a == b for x, y in zip(found, expected) for a, b in zip(x, y)]
        print("tokens", found, expected, file=log)
        return name, ("OK" if found == expected else "other tokens") + f", {sum(pairs)} of {len(pairs)} tokens of a fresh server"


def make_models(args):
    import vllm_families as families

    for family in ["qwen3", "qwen3_moe"]:
        for version in [1, 2]:
            folder = os.path.join(args.work, f"{family}-{version}")
            families.make(family, folder, seed=version)
            families.run(args.program, "quantize", folder, folder + "-fp8")


def everything(args):
    os.makedirs(args.work, exist_ok=True)
    models = {}
    for fp8 in [False, True]:
        folder = os.path.join(args.work, "model-fp8" if fp8 else "model")
        with open(folder + ".log", "w") as log:
            how = ["--trainer-quantize-fp8"] if fp8 else []
            if not run([args.program, "sync", "--synthetic", "tiny-moe", "--out", folder, *how], log, 120):
                sys.exit(f"no model: {folder}.log")
        # What the first rollout wrote.
        models[fp8] = os.path.join(folder, "rollout-0")
    kinds = [kind for kind in ["vllm", "sglang"] if getattr(args, kind)]
    transports = ["nccl", "ipc"] + (["zmq"] if args.moonshot else [])
    cases = [(kind, transport, fp8, False) for kind in kinds for transport in transports for fp8 in models]
    cases += [("vllm", "nccl", fp8, True) for fp8 in models if args.vllm]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(case, args, models[fp8], kind, transport, fp8, unpacked, 18000 + number)
                for number, (kind, transport, fp8, unpacked) in enumerate(cases)]
        if args.generate:
            make_models(args)
            each = [(family, transport, fp8) for family in ["qwen3", "qwen3_moe"] for transport in ["ipc", "nccl"] for fp8 in models]
            jobs += [pool.submit(generating, args, *one, number) for number, one in enumerate(each)]
        failed = False
        for job in concurrent.futures.as_completed(jobs):
            name, what = job.result()
            failed |= not what.startswith("OK")
            print(f"{name}: {what}", flush=True)
    sys.exit(failed)


def main():
    parser = argparse.ArgumentParser()
    what = parser.add_subparsers(dest="what", required=True)
    for kind in ["vllm", "sglang"]:
        one = what.add_parser(kind)
        one.add_argument("sources")
        one.add_argument("--transport", choices=["nccl", "ipc", "zmq"], default="nccl")
        one.add_argument("--port", type=int, default=8000)
        one.add_argument("--device", default="cuda:0", type=torch.device)
        one.add_argument("--out")
        one.add_argument("--moonshot", help="the sources of Moonshot's checkpoint-engine, for the transport zmq")
        one.add_argument("--model", help="a checkpoint for a whole vLLM; its folder is named after its family, as in `qwen3-1`")
    each = what.add_parser("all")
    each.add_argument("program", help="ckpt-engine")
    each.add_argument("--vllm")
    each.add_argument("--sglang")
    each.add_argument("--moonshot", help="the sources of Moonshot's checkpoint-engine, for the transport zmq; pyzmq is needed as well")
    each.add_argument("--work", required=True)
    each.add_argument("--generate", action="store_true", help="also with the vLLM that is installed, which generates")
    each.add_argument("--jobs", type=int, default=1, help="how many cases at a time")
    args = parser.parse_args()
    if args.what == "all":
        everything(args)
    serve(args)


if __name__ == "__main__":
    main()
