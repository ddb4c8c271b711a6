"""A server that receives with vLLM's own code: for the backend `vllm`, on a machine where vLLM as a whole does not fit.

    python3 xtask/tools/vllm_receiver.py VLLM --port 8000 --device cuda:0 --out DIR

VLLM is a folder with vLLM's sources (a wheel that was unpacked). Of these, what receives is used: the NCCL weight transfer
engine, its packing and its communicator. All else of vLLM is left out, and instead of a model there is a dictionary.
The routes, what is active when, and what an error looks like are those of vLLM 0.33's api_router and gpu_worker. When an
update is finished, all weights are written to DIR/model.safetensors, to be compared with `ckpt-engine verify`.

With the trainer on the same GPU, both take NCCL 2.30 or later, NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL_NVLS_ENABLE=0:

    ckpt-engine doctor --server http://127.0.0.1:8000
    ckpt-engine sync --backend vllm --server http://127.0.0.1:8000 --model MODEL
    ckpt-engine verify MODEL DIR
"""

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import os
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

REAL = {
    "vllm.distributed.weight_transfer.base",
    "vllm.distributed.weight_transfer.nccl_common",
    "vllm.distributed.weight_transfer.nccl_engine",
    "vllm.distributed.weight_transfer.packed_tensor",
    "vllm.distributed.device_communicators.pynccl",
    "vllm.distributed.device_communicators.pynccl_wrapper",
    "vllm.utils.nccl",
}


class Anything:
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
    def __init__(self, folder):
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        if name != "vllm" and not name.startswith("vllm."):
            return None
        if name in REAL:
            file = os.path.join(self.folder, *name.split(".")) + ".py"
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        module.__path__ = []
        match module.__name__:
            case "vllm.envs":
                module.VLLM_NCCL_SO_PATH = os.environ.get("VLLM_NCCL_SO_PATH")
                module.VLLM_DISABLE_PYNCCL = False
                module.VLLM_USE_NCCL_SYMM_MEM = False
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


class Worker:
    """One worker, as vLLM's gpu_worker drives its engine."""

    def __init__(self, device, out):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.lock = threading.Lock()
        self.active, self.paused, self.version, self.out = False, False, "default", out
        self.model = Model()
        parallel = types.SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config = types.SimpleNamespace(parallel_config=parallel, model_config=None)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.device = device
        self.engine = NCCLWeightTransferEngine(None, config, device, self.model)

    def call(self, path, body):
        # The engine core does one thing at a time.
        with self.lock:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            match path:
                case "/init_weight_transfer_engine":
                    self.engine.init_transfer_engine(self.engine.parse_init_info(body["init_info"]))
                case "/shutdown_weight_transfer_engine":
                    if self.active:
                        raise RuntimeError("Cannot release a trainer connection during a weight update")
                    self.engine.shutdown()
                case "/start_weight_update":
                    if self.active:
                        raise RuntimeError("start_weight_update called while a weight update is already active.")
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
                    self.active = False
                    self.version = (body or {}).get("weight_version") or self.version
                    if self.out:
                        write(self.model.tensors, self.out)
                case "/pause" | "/resume":
                    self.paused = path == "/pause"
                case "/weight_info":
                    return {"weight_version": self.version}
                case _:
                    return None
            return {"message": "done"}


def handler(worker):
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
            match self.path:
                case "/health":
                    self.say(200, None)
                case "/version":
                    self.say(200, {"version": "0.33.0"})
                case "/get_world_size":
                    self.say(200, {"world_size": 1})
                case _:
                    self.do_POST()

        def do_POST(self):
            text = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                answer = worker.call(self.path.split("?")[0], json.loads(text) if text else None)
            except Exception as error:
                words = f"Call to collective_rpc method failed: {error}"
                return self.say(500, {"error": {"message": words, "type": type(error).__name__, "code": 500}})
            if answer is None:
                return self.say(404, {"error": {"message": "Not Found"}})
            self.say(200, answer)

    return Handler


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("vllm")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda:0", type=torch.device)
    parser.add_argument("--out")
    args = parser.parse_args()
    sys.meta_path.insert(0, Finder(args.vllm))
    try:
        import pybase64  # noqa: F401
    except ImportError:
        import base64

        sys.modules["pybase64"] = base64
    server = ThreadingHTTPServer(("127.0.0.1", args.port), handler(Worker(args.device, args.out)))
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
