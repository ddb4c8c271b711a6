"""Servers that receive with vLLM's and SGLang's own code: for the backends `vllm` and `sglang`, on a machine with a GPU where
the servers as a whole do not fit.

    python3 xtask/tools/server_receiver.py vllm SOURCES --transport nccl --port 8000 --device cuda:1 --out DIR
    python3 xtask/tools/server_receiver.py sglang SOURCES --transport ipc --port 8000 --device cuda:0 --out DIR

SOURCES is a folder with the sources of vLLM or SGLang (a wheel that was unpacked). Of these, what receives is used: vLLM's
weight transfer engines with their packing and communicator; SGLang's weight updater with its buckets, its process group and its
unpickler. All else is left out, and instead of a model there is a dictionary. The routes, what is active when, and what an
error looks like are those of vLLM 0.33 and SGLang 0.5.23. When an update is finished, all weights are written to
DIR/model.safetensors, to be compared with `ckpt-engine verify`.

With `--delta`, it is vLLM's engine for positions and values that receives. With `--devices cuda:0,cuda:1` the server has a worker on each
GPU, a process of this program, and what they have is in DIR-0 and DIR-1.

With `--transport zmq` and `--moonshot SOURCES`, the sources of Moonshot's checkpoint-engine, its own worker receives, as an extension of
either server has it; that takes pyzmq.

All of it, one case after the other, with a line for each that says what came of it:

    python3 xtask/tools/server_receiver.py all PROGRAM --vllm SOURCES --sglang SOURCES [--moonshot SOURCES] [--generate] --work DIR

Twenty updates in a row by one trainer, with a digest of what the server has after each, which has to be that of the trainer's weights; and
how long updates take, with vLLM's own receiving code: beside vLLM's own trainer engine, a bare broadcast of as many bytes in the same
world, and this project's own transport on one GPU. The first update of each is not counted.

    python3 xtask/tools/server_receiver.py sequence PROGRAM --vllm SOURCES --sglang SOURCES --work DIR [--updates 20]
    python3 xtask/tools/server_receiver.py speed PROGRAM --vllm SOURCES --work DIR [--synthetic qwen3-30b-a3b] [--layers 24]

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
import fnmatch
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

REAL = {
    "vllm.distributed.weight_transfer.base",
    "vllm.distributed.weight_transfer.ipc_engine",
    "vllm.distributed.weight_transfer.nccl_common",
    "vllm.distributed.weight_transfer.nccl_engine",
    "vllm.distributed.weight_transfer.packed_tensor",
    "vllm.distributed.weight_transfer.sparse_nccl_engine",
    "vllm.model_executor.model_loader.checkpoint_weight_patch",
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
        self.tensors, self.loads = {}, True

    def load_weights(self, weights):
        for name, tensor in weights:
            if name not in self.tensors:
                self.tensors[name] = tensor.clone()
            elif self.loads:
                self.tensors[name].copy_(tensor)


NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3",
         "float8_e8m0fnu": "F8_E8M0", "int64": "I64", "int32": "I32", "uint8": "U8", "int8": "I8", "bool": "BOOL"}


def content(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


def digest(tensors):
    """Of every byte, name, type and shape; tensors as (name of the type, shape, bytes)."""
    every = hashlib.sha256()
    for name, (dtype, shape, part) in sorted(tensors.items()):
        every.update(f"{name} {dtype} {list(shape)} {len(part)} ".encode() + part)
    return every.hexdigest()


def read(folder):
    """The tensors of a checkpoint, as (name of the type, shape, bytes)."""
    found = {}
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            with open(os.path.join(folder, file), "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
                header.pop("__metadata__", None)
                parts = stream.read()
            for name, one in header.items():
                start, end = one["data_offsets"]
                found[name] = one["dtype"], one["shape"], parts[start:end]
    return found


def type_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def write(tensors, folder):
    os.makedirs(folder, exist_ok=True)
    header, parts, at = {}, [], 0
    for name, tensor in sorted(tensors.items()):
        part = content(tensor)
        dtype = NAMES[type_name(tensor)]
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


def finished(worker):
    """An update is over: all weights are written, or their digest is, if that is wanted. A whole vLLM generates instead."""
    if worker.args.out:
        write(worker.model.tensors, worker.args.out)
    if worker.args.digests:
        found = {name: (NAMES[type_name(one)], one.shape, content(one)) for name, one in worker.model.tensors.items()}
        with open(worker.args.digests, "a") as file:
            file.write(f"{worker.version} {digest(found)}\n")


class Vllm:
    """One worker, as vLLM's gpu_worker drives its engine."""

    moonshot = None

    def __init__(self, args):
        transport, device = args.transport, args.device
        if transport == "zmq":
            Engine = Anything
        elif args.delta:
            from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLWeightTransferEngine as Engine

            make_do()
        elif transport == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine as Engine

            make_do()
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine as Engine
        self.active, self.version, self.device, self.args = False, "default", device, args
        self.model, config = self.load()
        self.engine = Engine(None, config, device, self.model)

    def load(self):
        """A model, and vLLM's configuration."""
        workers, rank = self.args.workers, self.args.rank
        parallel = types.SimpleNamespace(data_parallel_index=0, world_size=workers, rank=rank)
        return Model(), types.SimpleNamespace(parallel_config=parallel, model_config=None)

    def call(self, path, body):
        match path:
            case "/health":
                return {}
            case "/version":
                return {"version": "0.33.0"}
            case "/get_world_size":
                return {"world_size": self.args.workers}
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
                finished(self)
            case "/collective_rpc":
                if not self.moonshot or body["method"] != "update_weights_from_ipc":
                    raise NotImplementedError(f"Method {body['method']!r} is not implemented.")
                self.moonshot(self.model, body["args"][0], self.device)
            case "/update_weight_version":
                self.version = body["new_version"]
                finished(self)
            case "/pause" | "/resume":
                pass
            # Of this program, to measure.
            case "/tensors":
                return [[name, type_name(one), list(one.shape)] for name, one in self.model.tensors.items()]
            case "/loads":
                self.model.loads = body["loads"]
            case "/broadcasts":
                buffer = torch.empty(body["bytes"], dtype=torch.uint8, device=self.device)
                for _ in range(body["count"]):
                    self.engine.model_update_group.broadcast(buffer, src=0)
            case _:
                return None
        return {"message": "done"}

    def error(self, error):
        causes = f"{error}" + (f" ({error.__cause__})" if error.__cause__ else "")
        words = f"Call to collective_rpc method failed: {causes}"
        return 500, {"error": {"message": words, "type": type(error).__name__, "code": 500}}


class WholeVllm(Vllm):
    """The vLLM that is installed, in this process, with the engines of SOURCES as what receives."""

    def __init__(self, args):
        import vllm_families as families
        from vllm import LLM

        self.families, self.family = families, os.path.basename(args.model).split("-")[0]
        self.llm = LLM(**families.engine_options(self.family, args.model))
        # It has imported its own by now, and does not use them.
        for name in REAL & set(sys.modules):
            del sys.modules[name]
        super().__init__(args)

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


class Answered(Exception):
    pass


class Front:
    """A server of several workers, each a process of this program on a GPU of its own: all of them are told everything."""

    def __init__(self, args):
        self.workers = []
        for rank, device in enumerate(args.devices):
            command = [sys.executable, __file__, args.what, args.sources, "--transport", args.transport, "--device", device,
                       "--rank", str(rank), "--workers", str(len(args.devices)), "--port", str(args.port + 500 + 10 * rank)]
            command += ["--out", f"{args.out}-{rank}"] if args.out else []
            command += ["--moonshot", args.moonshot] if args.moonshot else []
            command += ["--delta"] if args.delta else []
            process = subprocess.Popen(command)
            self.workers.append((process, f"http://127.0.0.1:{args.port + 500 + 10 * rank}"))
        for process, url in self.workers:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    ask(url, {"vllm": "/health", "sglang": "/model_info"}[args.what], {})
                    break
                time.sleep(0.3)
        self.pool = concurrent.futures.ThreadPoolExecutor(len(self.workers))

    def call(self, path, body):
        def tell(worker):
            try:
                return 200, ask(worker[1], path, body or {})
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        answers = list(self.pool.map(tell, self.workers))
        worst = max(answers, key=lambda answer: answer[0])
        if worst[0] != 200:
            raise Answered(*worst)
        return answers[0][1]

    def error(self, error):
        return error.args if isinstance(error, Answered) else (500, {"error": {"message": str(error)}})


def ask(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=200))


class Sglang:
    """One worker, as SGLang's scheduler drives its updater."""

    moonshot = None

    def __init__(self, args):
        from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        # The group of the server's own workers, without which none is made with others.
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        monkey_patch_torch_reductions()
        self.deserialize = MultiprocessingSerializer.deserialize
        self.active, self.version, self.device, self.args = False, "default", args.device, args
        self.model, device = Model(), args.device
        self.updater = WeightUpdater(
            tp_rank=args.rank, device=str(device), gpu_id=device.index or 0, model_config=None, custom_weight_loaders={},
            get_model=lambda: self.model, update_model_fields=None, recapture_cuda_graph=None, get_model_runner=None)

    def call(self, path, body):
        updater = self.updater
        done = True, "Success"
        match path:
            case "/model_info":
                return {"weight_version": self.version}
            case "/server_info":
                return {"version": "0.5.23", "tp_size": self.args.workers, "dp_size": 1, "pp_size": 1, "weight_cache_mode": "off"}
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
                finished(self)
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
                bucket = self.deserialize(body["serialized_named_tensors"][self.args.rank])
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
                    if device and device.type == "cuda":
                        torch.cuda.set_device(device)
                    answer = worker.call(self.path.split("?")[0], json.loads(text) if text else None)
                    if device and device.type == "cuda":
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
        worker = lambda: WholeVllm(args)
        import vllm.distributed.weight_transfer  # noqa: F401  its own first: what follows replaces parts of it
        import vllm.v1.worker.gpu_worker  # noqa: F401
    else:
        finder = Finder(args.sources, lambda name: True)
        worker = lambda: Front(args) if args.devices else {"vllm": Vllm, "sglang": Sglang}[args.what](args)
    sys.meta_path.insert(0, finder)
    try:
        import pybase64  # noqa: F401
    except ImportError:
        import base64

        sys.modules["pybase64"] = base64
    if args.device.type == "cuda" and not args.devices:
        torch.cuda.set_device(args.device)
    worker = worker()
    worker.moonshot = None if args.devices else moonshot(args.moonshot)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), handler(worker, None if args.devices else args.device))
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
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.route = route

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Its workers, if those are processes, are in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
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


class Case(typing.NamedTuple):
    """A kind of servers, and how weights get there."""

    kind: str
    transport: str
    fp8: bool = False
    unpacked: bool = False
    # A worker on each of two GPUs.
    two: bool = False
    delta: bool = False
    # From the second update on, one call is an update.
    one_call: bool = False

    def name(self):
        words = [word for word in ["unpacked", "two", "delta", "one_call", "fp8"] if getattr(self, word)]
        return "-".join([self.kind, self.transport, *words])

    def device(self):
        return "cuda:1" if self.transport == "nccl" and torch.cuda.device_count() > 1 else "cuda:0"

    def receiver(self, args):
        options = [getattr(args, self.kind), "--transport", self.transport]
        options += ["--devices", "cuda:0,cuda:1"] if self.two else ["--device", self.device()]
        options += ["--moonshot", args.moonshot] if self.transport == "zmq" else []
        return options + (["--delta"] if self.delta else [])

    def sync(self, args, server, *options):
        chosen = {"transport": self.transport}
        chosen |= {"unpacked": True} if self.unpacked else {}
        chosen |= {"devices": ["cuda:0", "cuda:1"]} if self.two else {}
        chosen |= {"delta": True} if self.delta else {}
        chosen |= {"calls": "update"} if self.one_call else {}
        kwargs = [word for key, value in chosen.items()
                  for word in ["--engine-kwarg", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]]
        return [args.program, "sync", "--backend", self.kind, "--device", "cuda:0", "--server", server.url, "--json", *kwargs, *options]


def case(args, model, one, port):
    """One server, three updates, and every byte of what its workers have."""
    name, out = one.name(), os.path.join(args.work, one.name())
    with open(out + ".log", "w") as log, Receiver(log, one.kind, port, *one.receiver(args), "--out", out) as server:
        if failed := server.wait(60):
            return name, failed
        steps = [("doctor", [args.program, "doctor", "--server", server.url]),
                 ("sync", one.sync(args, server, "--model", model, "--updates", "3"))]
        steps += [("verify", [args.program, "verify", model, found])
                  for found in ([f"{out}-0", f"{out}-1"] if one.two else [out])]
        # The doctor asks servers of vLLM how their own engines are configured, of which this transport needs none.
        for step, command in steps[1 if one.transport == "zmq" else 0 :]:
            if not run(command, log, 120):
                return name, f"{step} failed"
        return name, "OK"


def small_model(folder, seed):
    """A checkpoint with layers that are quantised and others that are not."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": [512, 256], "model.norm.weight": [256], "lm_head.weight": [512, 256]}
    for layer in range(6):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": [256, 256] for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": [384, 256] for part in ["gate", "up"]}
        shapes |= {f"{name}.mlp.down_proj.weight": [256, 384], f"{name}.input_layernorm.weight": [256]}
    write({name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}, folder)
    return folder


def signed(number):
    return number - (1 << 64) if number >> 63 else number


def perturbed(name, part, steps):
    """A tensor in BF16 after so many steps of the program's own training: the lowest bits of an eighth of its elements flip."""
    if not steps:
        return part
    mask, number = (1 << 64) - 1, 0xCBF29CE484222325
    for byte in name.encode() + steps.to_bytes(8, "little"):
        number = (number ^ byte) * 0x100000001B3 & mask
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & mask
    number = (number ^ number >> 27) * 0x94D049BB133111EB & mask
    number ^= number >> 31
    right = lambda x, by: (x >> by) & ((1 << (64 - by)) - 1)
    words = torch.frombuffer(bytearray(part + bytes(-len(part) % 8)), dtype=torch.int64)
    x = torch.arange(len(words), dtype=torch.int64) + signed(number)
    x = ~x + (x << 21)
    x = x ^ right(x, 24)
    x = x + (x << 3) + (x << 8)
    x = x ^ right(x, 14)
    x = x + (x << 2) + (x << 4)
    x = x ^ right(x, 28)
    x = x + (x << 31)
    rotated = [right(x, by) | (x << (64 - by)) for by in (21, 43)]
    flips = x & rotated[0] & rotated[1] & 0x0001000100010001
    return content(words ^ flips)[: len(part)]


def sequence(args):
    """Many updates in a row by one trainer, and the digest of what the server has after each."""
    os.makedirs(args.work, exist_ok=True)
    model, bad = small_model(os.path.join(args.work, "small"), 1), False
    expected = {False: [], True: []}
    for version in range(1, args.updates + 1):
        steps = args.updates - version
        there = {name: (dtype, shape, perturbed(name, part, steps)) for name, (dtype, shape, part) in read(model).items()}
        expected[False].append(digest(there))
        folder = os.path.join(args.work, f"version-{version}")
        write({name: torch.frombuffer(bytearray(part), dtype=torch.bfloat16).view(shape)
               for name, (_, shape, part) in there.items()}, folder)
        subprocess.run([args.program, "quantize", folder, folder + "-fp8"], check=True, capture_output=True)
        expected[True].append(digest(read(folder + "-fp8")))
    cases = [Case(kind, "nccl", fp8) for kind in ["vllm", "sglang"] if getattr(args, kind) for fp8 in [False, True]]
    cases += [Case("vllm", "nccl", delta=True), Case("vllm", "nccl", True, one_call=True)] if args.vllm else []
    for number, one in enumerate(cases):
        name = "sequence-" + one.name()
        log_file, digests = (os.path.join(args.work, name + end) for end in [".log", ".digests"])
        with open(log_file, "w") as log, Receiver(log, one.kind, 18300 + number, *one.receiver(args), "--digests", digests) as server:
            failed = server.wait(60)
            options = ["--model", model, "--updates", str(args.updates), *(["--trainer-quantize-fp8"] if one.fp8 else [])]
            if not failed and not run(one.sync(args, server, *options), log, 200):
                failed = "sync failed"
        lines = open(digests).read().split("\n")[:-1] if os.path.exists(digests) else []
        wanted = [f"{version} {one}" for version, one in enumerate(expected[one.fp8], 1)]
        same = sum(line == want for line, want in zip(lines, wanted))
        bad |= bool(failed) or same != len(wanted) or len(lines) != len(wanted)
        print(f"{name}: {failed or 'sent'}, {same} of {len(wanted)} digests are those of the trainer's weights", flush=True)
    sys.exit(bad)


def own_trainer(args):
    """vLLM's own trainer engine, with weights as the server has them; then as many bytes by bare broadcasts in the same world."""
    torch.cuda.set_device(args.device)
    sys.meta_path.insert(0, Finder(args.sources, lambda name: True))
    try:
        import pybase64  # noqa: F401
    except ImportError:
        import base64

        sys.modules["pybase64"] = base64
    import base64
    import pickle

    from vllm.distributed.weight_transfer.base import ParamMeta

    tensors = {}
    for name, dtype, shape in ask(args.url, "/tensors", {}):
        dtype = getattr(torch, dtype)
        words = torch.randint(0, 60, (max(1, math.prod(shape) * dtype.itemsize),), dtype=torch.uint8, device=args.device)
        tensors[name] = words.view(dtype).view(shape)

    class Source:
        metadata = [ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]

        def iter_full(self):
            return iter(tensors.items())

    class Client:
        def start_weight_update(self):
            ask(args.url, "/start_weight_update", {})

        def update_weights(self, info):
            if info.get("ipc_handles") is not None:
                info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(info.pop("ipc_handles"))).decode()
            ask(args.url, "/update_weights", {"update_info": {key: value for key, value in info.items() if value is not None}})

        def finish_weight_update(self, weight_version=None):
            ask(args.url, "/finish_weight_update", {})

    total = sum(one.numel() * one.element_size() for one in tensors.values())
    bucket = args.bucket_mb << 20
    if args.transport == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine as Engine

        ask(args.url, "/init_weight_transfer_engine", {"init_info": {"packed": True}})
    else:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine as Engine

        make_do()
        uid = bytes(NCCLLibrary().ncclGetUniqueId())
        info = {"nccl_unique_id_b64": base64.b64encode(uid).decode(), "rank_offset": 1, "world_size": 2, "packed": True,
                "packed_buffer_size_bytes": bucket, "packed_num_buffers": 2}
        pool = concurrent.futures.ThreadPoolExecutor(1)
        joined = pool.submit(ask, args.url, "/init_weight_transfer_engine", {"init_info": info})
        group = PyNcclCommunicator.from_unique_id_bytes(uid, 0, 2, args.device)
        joined.result()
    engine = Engine(client=Client(), source=Source(), packed=True, packed_buffer_size_bytes=bucket)
    if args.transport == "nccl":
        engine.model_update_group = group

    # An update that another trainer left open is ended.
    with contextlib.suppress(urllib.error.HTTPError):
        ask(args.url, "/finish_weight_update", {})

    def timed(work):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    own = [timed(engine.send_weights) for _ in range(args.updates)]
    bare = []
    if args.transport == "nccl":
        count, buffer = -(-total // bucket), torch.randint(0, 255, (bucket,), dtype=torch.uint8, device=args.device)
        whole = {"bytes": bucket, "count": count}

        def broadcasts():
            heard = pool.submit(ask, args.url, "/broadcasts", whole)
            for _ in range(count):
                group.broadcast(buffer, src=0)
            heard.result()
            torch.cuda.synchronize()

        # The bytes of whole buckets, less those that the model does not fill.
        bare = [timed(broadcasts) * total / (count * bucket) for _ in range(args.updates)]
    print(json.dumps({"bytes": total, "tensors": len(tensors), "own": own, "bare": bare}), flush=True)


def median(seconds, skip=1):
    return statistics.median(seconds[skip:]) if len(seconds) > skip else float("nan")


def measured(command, log, limit):
    """The lines of JSON that a command prints."""
    with tempfile.TemporaryFile("w+") as said:
        print("+", *command, file=log, flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, stdout=said, stderr=log, timeout=limit)
        said.seek(0)
        lines = said.read().splitlines()
    print(*lines, sep="\n", file=log, flush=True)
    return [json.loads(line) for line in lines if line.startswith("{")]


def speed(args):
    """How long updates take, beside vLLM's own trainer, a bare broadcast and this project's own transport."""
    os.makedirs(args.work, exist_ok=True)
    print("GPUs:", *{torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())}, flush=True)
    for transport, layers in [("nccl", args.layers), ("ipc", args.ipc_layers)]:
        if not layers:
            continue
        one = Case("vllm", transport, True)
        common = ["--synthetic", args.synthetic, "--layers", str(layers), "--trainer-quantize-fp8", "--bucket-mb", str(args.bucket_mb)]
        name = f"speed-{transport}"
        with open(os.path.join(args.work, name + ".log"), "w") as log, Receiver(log, "vllm", 18400, *one.receiver(args)) as server:
            if failed := server.wait(60):
                print(f"{name}: {failed}", flush=True)
                continue
            found = {}
            for what, loads in [("weights are copied into the model", True), ("nothing is loaded", False)][: 2 if transport == "nccl" else 1]:
                ask(server.url, "/loads", {"loads": loads})
                for how, case in [("", one), ("by one call, ", one._replace(one_call=True))][: 2 if transport == "nccl" else 1]:
                    lines = measured(case.sync(args, server, *common, "--updates", str(args.updates)), log, 80)
                    # The first update of one call has a call for each bucket.
                    found[f"this, {how}{what}"] = median([line["seconds"] for line in lines], 2 if how else 1)
                theirs = [sys.executable, __file__, "own-trainer", args.vllm, "--url", server.url, "--transport", transport,
                          "--bucket-mb", str(args.bucket_mb), "--updates", str(args.updates)]
                for line in measured(theirs, log, 60):
                    found["vLLM's own trainer, " + what] = median(line["own"])
                    if line["bare"]:
                        found["bare broadcast"] = median(line["bare"])
                    found["GB"] = line["bytes"] / 1e9
                    found["tensors"] = line["tensors"]
                for line in lines[-1:]:
                    print(*line["slower"], line["stages"], sep="\n", flush=True)
                    found["GB of this"] = lines[-1]["wire_bytes"] / 1e9
        if transport == "ipc":
            with open(os.path.join(args.work, "speed-own.log"), "w") as log:
                command = [args.program, "bench", "transfer", "--backend", "ipc", "--device", "cuda:0", *common, "--rollouts", "1",
                           "--repeats", str(args.updates), "--json"]
                for line in measured(command, log, 80):
                    if line.get("what") == "model":
                        digests = "with digests" if line["digests"] else "without digests"
                        found["this project's own ipc, " + digests] = line["seconds"]
        print(f"{name}: {args.synthetic}, {layers} layers, FP8, buckets of {args.bucket_mb} MiB", flush=True)
        for what, value in found.items():
            print(f"    {what}: {value if isinstance(value, (dict, list)) else round(value, 4)}", flush=True)


def generating(args, family, one, number):
    """A vLLM that generates, updated from a first version to a second; and one that was started with the second."""
    name, transport, fp8 = f"generate-{family}-{one.name()}", one.transport, one.fp8
    first, second = (os.path.join(args.work, f"{family}-{version}" + ("-fp8" if fp8 else "")) for version in (1, 2))
    count = torch.cuda.device_count()
    # vLLM takes the first GPU that it sees: over NCCL that is not the trainer's.
    trainer, other = str(number % count), str((number + 1) % count)
    gpus = trainer if transport == "ipc" else other
    options = [args.vllm, "--transport", transport, "--device", "cuda:0", *(["--delta"] if one.delta else []), "--model"]
    port = 18100 + 2 * number
    with (open(os.path.join(args.work, name + ".log"), "w") as log, open(os.path.join(args.work, name + "-fresh.log"), "w") as other,
          Receiver(log, "vllm", port, *options, first, gpus=gpus) as server,
          Receiver(other, "vllm", port + 1, *options, second, gpus=gpus) as fresh):
        if failed := server.wait(200) or fresh.wait(200):
            return name, failed
        before, expected = server.tokens(), fresh.tokens()
        if before == expected:
            return name, "both versions generate the same"
        sync = ["env", f"CUDA_VISIBLE_DEVICES={trainer}", *one.sync(args, server), "--model", os.path.join(args.work, f"{family}-2"),
                "--updates", "3", *(["--trainer-quantize-fp8"] if fp8 else [])]
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
    small = small_model(os.path.join(args.work, "small"), 1)
    models = {False: small, True: small + "-fp8"}
    subprocess.run([args.program, "quantize", small, models[True]], check=True)
    kinds = [kind for kind in ["vllm", "sglang"] if getattr(args, kind)]
    transports = ["nccl", "ipc"] + (["zmq"] if args.moonshot else [])
    cases = [Case(kind, transport, fp8) for kind in kinds for transport in transports for fp8 in models]
    # vLLM's own communicator has no FP8 for single weights.
    cases += [Case("vllm", "nccl", unpacked=True), Case("vllm", "nccl", delta=True)] if args.vllm else []
    cases += [Case("vllm", "nccl", fp8, one_call=True) for fp8 in models] if args.vllm else []
    if torch.cuda.device_count() > 1:
        cases += [Case(kind, transport, fp8, two=True) for kind in kinds for transport in transports[1:] for fp8 in models]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        is_wanted = lambda name: not args.only or fnmatch.fnmatchcase(name, args.only)
        cases = [one for one in cases if is_wanted(one.name())]
        jobs = [pool.submit(case, args, models[one.fp8], one, 18000 + number) for number, one in enumerate(cases)]
        if args.generate:
            make_models(args)
            each = [Case("vllm", transport, fp8) for transport in ["ipc", "nccl"] for fp8 in models]
            each += [Case("vllm", "nccl", delta=True), Case("vllm", "nccl", True, one_call=True)]
            each = [(family, one) for family in ["qwen3", "qwen3_moe"] for one in each]
            each = [(family, one) for family, one in each if is_wanted(f"generate-{family}-{one.name()}")]
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
        one.add_argument("--devices", type=lambda text: text.split(","), help="of a server of several workers, such as cuda:0,cuda:1")
        one.add_argument("--delta", action="store_true", help="positions and values, as vLLM's backend sparse_nccl takes them")
        one.add_argument("--workers", type=int, default=1, help="how many the server has that this one is of")
        one.add_argument("--rank", type=int, default=0, help="which one of them this is")
        one.add_argument("--out", help="the folder to which weights are written after each update")
        one.add_argument("--digests", help="the file to which a line with the digest of all weights is written after each update")
        one.add_argument("--moonshot", help="the sources of Moonshot's checkpoint-engine, for the transport zmq")
        one.add_argument("--model", help="a checkpoint for a whole vLLM; its folder is named after its family, as in `qwen3-1`")
    drivers = {"all": everything, "sequence": sequence, "speed": speed}
    for name in drivers:
        one = what.add_parser(name)
        one.add_argument("program", help="ckpt-engine")
        one.add_argument("--vllm")
        one.add_argument("--sglang")
        one.add_argument("--work", required=True)
        if name == "all":
            one.add_argument("--moonshot", help="the sources of Moonshot's checkpoint-engine, for the transport zmq; pyzmq is needed as well")
            one.add_argument("--only", help="the name of a case, or a pattern of names: 'generate-*-delta'")
            one.add_argument("--generate", action="store_true", help="also with the vLLM that is installed, which generates")
            one.add_argument("--jobs", type=int, default=1, help="how many cases at a time")
        else:
            one.add_argument("--updates", type=int, default={"sequence": 20, "speed": 6}[name])
        if name == "speed":
            one.add_argument("--synthetic", default="qwen3-30b-a3b")
            one.add_argument("--layers", type=int, default=24, help="over NCCL; 0 leaves it out")
            one.add_argument("--ipc-layers", type=int, default=24, help="by CUDA IPC, where one GPU has both models; 0 leaves it out")
            one.add_argument("--bucket-mb", type=int, default=1024)
    own = what.add_parser("own-trainer", help="vLLM's own trainer engine, which sends to a server of this program")
    own.add_argument("sources")
    own.add_argument("--url", required=True)
    own.add_argument("--transport", choices=["nccl", "ipc"], default="nccl")
    own.add_argument("--device", default="cuda:0", type=torch.device)
    own.add_argument("--bucket-mb", type=int, default=1024)
    own.add_argument("--updates", type=int, default=6)
    args = parser.parse_args()
    drivers.get(args.what, own_trainer if args.what == "own-trainer" else serve)(args)


if __name__ == "__main__":
    main()
