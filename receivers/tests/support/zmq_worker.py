"""A server of one worker that hears of buckets by ZeroMQ's own library, and takes them for what torch takes them for.

What it is told of memory is looked at and not opened: the memory is the trainer's, and no GPU's. It says by `/model_info` what
it loaded last.
"""

import os
import sys
import traceback

sys.path.insert(0, os.environ["CKPT_ENGINE_PYZMQ"])

import torch
import zmq
from torch.multiprocessing import reductions
from worker_http import serve

GPU = "GPU-" + sys.argv[1]
STATE = {"weight_version": "default", "loaded": [], "finished": 0}
CONTEXT = zmq.Context()


def load(buckets, memory):
    for item in buckets:
        shape, dtype, offset = torch.Size(item["shape"]), item["dtype"], item["offset"]
        if "refused" in item["name"]:
            raise RuntimeError(f"{item['name']}: CUDA out of memory")
        # Refused by torch if it is not aligned.
        memory[offset : offset + dtype.itemsize * shape.numel()].view(dtype).view(shape)
        STATE["loaded"].append(item["name"])


def update(address):
    socket = CONTEXT.socket(zmq.REP)
    socket.connect(address)
    try:
        rebuild, arguments = socket.recv_pyobj()
        assert rebuild is reductions.rebuild_cuda_tensor
        names = rebuild.__code__.co_varnames[: rebuild.__code__.co_argcount]
        tensor = dict(zip(names, arguments, strict=True))
        assert tensor["tensor_cls"] is torch.Tensor and tensor["dtype"] is torch.uint8
        memory = torch.zeros(tensor["tensor_size"], dtype=torch.uint8)
        socket.send(b"")
        STATE["loaded"], released = [], False
        while True:
            said = socket.recv_pyobj()
            if isinstance(said, Exception):
                raise said
            if said is None:
                socket.send(b"")
                if released:
                    STATE["finished"] += 1
                    return
                released = True
                continue
            assert isinstance(said, list) and not released
            try:
                load(said, memory)
                socket.send(b"")
            except Exception:
                socket.send_string(traceback.format_exc())
    finally:
        socket.close()


def answer(path, told):
    if path == "/server_info":
        return 200, {"version": "0.5.23", "tp_size": 1}
    if path == "/model_info":
        return 200, STATE
    if path == "/update_weight_version":
        STATE["weight_version"] = told["new_version"]
    if path == "/update_weights_from_ipc":
        addresses = told["zmq_handles"]
        if GPU not in addresses:
            return 400, {"success": False, "message": f"Device UUID {GPU} not found in zmq_handles: {list(addresses)}"}
        update(addresses[GPU])
    return 200, {"success": True, "message": ""}


serve(answer)
