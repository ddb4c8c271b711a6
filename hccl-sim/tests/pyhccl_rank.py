"""One rank of a communicator, by the HCCL wrapper of another project.

    python3 pyhccl_rank.py --libraries FOLDER --wrapper FILE --rank R --ranks N --root-info FILE

The wrapper is `pyhccl_wrapper.py` of the PyPI package `vllm_ascend`. What it imports is replaced by
the few names that it uses; device memory and streams come from `libascendcl.so` by ctypes.

Rank 0 writes the root info to the file (all bytes at once); another rank waits for the file, so any
program can be rank 0. Then the operations are run in their order, and the digest of the broadcast buffer is
printed as JSON:

    broadcast       of `--bytes` bytes from `--root`, which have to be those that a rank of this script has
    broadcast:R     the same from rank R
    allreduce       of a single INT8 as barrier
    join            what a rank of backend-hccl begins with: a broadcast of rank 0, and a reduction
"""

import argparse
import ctypes
import hashlib
import importlib.util
import json
import logging
import os
import sys
import time
import types

HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
REPEAT_INITIALIZE = 100002
# What `join` sends.
PROBE = 256


def stand_in(name, **attributes):
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def load_wrapper(path):
    stand_in("torch", dtype=object)
    stand_in("torch.distributed", ReduceOp=object)
    stand_in("vllm")
    stand_in("vllm.logger", logger=logging.getLogger("vllm"))
    stand_in("vllm_ascend")
    stand_in("vllm_ascend.utils", find_hccl_library=lambda: None)
    spec = importlib.util.spec_from_file_location("pyhccl_wrapper", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pyhccl_wrapper"] = module
    spec.loader.exec_module(module)
    return module


class Acl:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)

    def call(self, name, *arguments, but=0):
        code = getattr(self.library, name)(*arguments)
        if code not in (0, but):
            raise RuntimeError(f"{name}: {code}")

    def allocate(self, size):
        address = ctypes.c_void_p()
        self.call("aclrtMalloc", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_int(0))
        return address

    def copy(self, to, source, size, kind):
        n = ctypes.c_size_t(size)
        self.call("aclrtMemcpy", to, n, source, n, ctypes.c_int(kind))

    def read(self, source, size):
        to = ctypes.create_string_buffer(size)
        self.copy(to, source, size, DEVICE_TO_HOST)
        return to.raw


def root_info(hccl, wrapper, path, rank, deadline):
    if rank == 0:
        info = hccl.hcclGetUniqueId()
        with open(path + ".part", "wb") as file:
            file.write(bytes(info))
        os.rename(path + ".part", path)
        return info
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.02)
    with open(path, "rb") as file:
        return wrapper.hcclUniqueId.from_buffer_copy(file.read())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--libraries", required=True)
    parser.add_argument("--wrapper", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--root-info", required=True)
    parser.add_argument("--device", type=int, help="by default, the rank's number")
    parser.add_argument("--bytes", type=int, default=3_000_001)
    parser.add_argument("--root", type=int, default=0)
    parser.add_argument("--operations", default="broadcast,allreduce")
    parser.add_argument("--seconds", type=float, default=30, help="to wait for the root info")
    options = parser.parse_args()

    wrapper = load_wrapper(options.wrapper)
    acl = Acl(os.path.join(options.libraries, "libascendcl.so"))
    hccl = wrapper.HCCLLibrary(os.path.join(options.libraries, "libhccl.so"))
    acl.call("aclInit", None, but=REPEAT_INITIALIZE)
    acl.call("aclrtSetDevice", options.rank if options.device is None else options.device)
    deadline = time.monotonic() + options.seconds
    info = root_info(hccl, wrapper, options.root_info, options.rank, deadline)
    comm = hccl.hcclCommInitRank(options.ranks, info, options.rank)

    stream = ctypes.c_void_p()
    acl.call("aclrtCreateStream", ctypes.byref(stream))
    types_, reductions = wrapper.hcclDataTypeEnum, wrapper.hcclRedOpTypeEnum

    def broadcast(buffer, given, root):
        """The bytes that arrive where rank `root` gives its own."""
        if options.rank == root:
            acl.copy(buffer, given, len(given), HOST_TO_DEVICE)
        hccl.hcclBroadcast(buffer, len(given), types_.hcclUint8, root, comm, stream)
        acl.call("aclrtSynchronizeStream", stream)
        return acl.read(buffer, len(given))

    def reduce(buffer, given, how):
        """What becomes of the bytes that all ranks give."""
        acl.copy(buffer, given, len(given), HOST_TO_DEVICE)
        hccl.hcclAllReduce(buffer, buffer, len(given), types_.hcclInt8, how, comm, stream)
        acl.call("aclrtSynchronizeStream", stream)
        return acl.read(buffer, len(given))

    def check(what, found, expected):
        if found != expected:
            differ = sum(a != b for a, b in zip(found, expected))
            raise RuntimeError(f"{what}: {differ} of {len(expected)} bytes are others")

    size = options.bytes
    buffer, small = acl.allocate(size), acl.allocate(PROBE)

    def bytes_of(rank):
        """Every rank has bytes of its own."""
        period = bytes((7 * i + rank) % 251 for i in range(251))
        return (period * (size // 251 + 1))[:size]

    own = bytes_of(options.rank)
    acl.copy(buffer, own, size, HOST_TO_DEVICE)
    for operation in options.operations.split(","):
        name, _, root = operation.partition(":")
        if name == "broadcast":
            root = int(root) if root else options.root
            check(operation, broadcast(buffer, own, root), bytes_of(root))
        elif operation == "allreduce":
            check(operation, reduce(small, bytes([1]), reductions.hcclSum), bytes([options.ranks]))
        elif operation == "join":
            first, second = bytes([0x5A]) * PROBE, bytes([0x2D]) * PROBE
            check("broadcast of join", broadcast(small, first, 0), first)
            given = second if options.rank == 0 else bytes(PROBE)
            check("reduction of join", reduce(small, given, reductions.hcclMax), second)
        else:
            raise ValueError(operation)
    result = acl.read(buffer, size)
    hccl.hcclCommDestroy(comm)
    print(json.dumps({"sha256": hashlib.sha256(result).hexdigest(), "own": result == own}), flush=True)


if __name__ == "__main__":
    main()
