"""A server of one worker that meets the trainer as SGLang's workers do, by torch's own code, and says what it found.

In the place of NCCL stands a backend without communication, for the same kind of device: what the store is asked for,
and with which prefixes, is what torch makes of it.
"""

import base64
import collections
import datetime
import pickle
import sys
import types

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper
from worker_http import serve

STORES = []
TIMEOUT = datetime.timedelta(seconds=50)


def create(store, rank, size, timeout):
    STORES.append(store)
    return FakeProcessGroup._create_internal(rank, size)


Backend.register_backend("silent", create, devices=["cuda"])


def meet(told):
    assert told["backend"] == "nccl"
    url = f"tcp://{told['master_address']}:{told['master_port']}"
    rank, size, name = told["rank_offset"], told["world_size"], told["group_name"]
    store, rank, size = next(dist.rendezvous(url, rank, size, timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    store = PrefixStore(name, store)
    _new_process_group_helper(size, rank, [], Backend("silent"), store, group_name=name, timeout=TIMEOUT)


def read(told):
    """What a bucket's pickle is to torch, with everything but the memory itself."""
    reductions = torch.multiprocessing.reductions
    buckets = types.ModuleType("sglang.srt.weight_sync.tensor_bucket")
    fields = ["name", "shape", "dtype", "start_idx", "end_idx", "numel"]
    buckets.FlattenedTensorMetadata = collections.namedtuple("FlattenedTensorMetadata", fields)
    for parent in ["sglang", "sglang.srt", "sglang.srt.weight_sync"]:
        sys.modules[parent] = types.ModuleType(parent)
    sys.modules[buckets.__name__] = buckets
    rebuild, reductions.rebuild_cuda_tensor = reductions.rebuild_cuda_tensor, lambda *arguments: arguments
    bucket = pickle.loads(base64.b64decode(told["serialized_named_tensors"][0], validate=True))
    reductions.rebuild_cuda_tensor = rebuild
    names = rebuild.__code__.co_varnames[: rebuild.__code__.co_argcount]
    tensor = dict(zip(names, bucket["flattened_tensor"], strict=True))
    assert tensor["tensor_cls"] is torch.Tensor and tensor["storage_cls"] is torch.storage.TypedStorage
    assert tensor["dtype"] is torch.uint8 and tensor["tensor_stride"] == (1,) and tensor["tensor_offset"] == 0
    assert tensor["tensor_size"] == (tensor["storage_size_bytes"],) and len(tensor["storage_handle"]) == 64
    assert not tensor["requires_grad"] and tensor["event_sync_required"] is False
    assert all(isinstance(tensor[key], bytes) for key in ["storage_handle", "ref_counter_handle", "event_handle"])
    # SGLang puts the device of this UUID in its place.
    assert isinstance(tensor["storage_device"], str) and isinstance(tensor["storage_offset_bytes"], int)
    # Nobody who drops the tensor misses the file that counts its readers.
    torch.UntypedStorage._release_ipc_counter(tensor["ref_counter_handle"], tensor["ref_counter_offset"], device=0)
    content = torch.zeros(tensor["storage_size_bytes"], dtype=torch.uint8)
    at = 0
    for meta in bucket["metadata"]:
        assert meta.start_idx == at and meta.end_idx - at == meta.numel, meta
        at = meta.end_idx
        content[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)
    return f"a bucket of {len(bucket['metadata'])} tensors, the first one {bucket['metadata'][0].name}"


def answer(path, told):
    if path == "/server_info":
        return 200, {"version": "0.5.23", "tp_size": 1}
    if path == "/model_info":
        return 200, {"weight_version": "default"}
    if path == "/init_weights_update_group":
        meet(told)
    if path == "/update_weights_from_distributed":
        # A communicator's id, as ProcessGroupNCCL asks for that of its first one.
        return 400, {"success": False, "message": f"the id is {STORES[-1].get('0').hex()}"}
    if path == "/update_weights_from_tensor":
        return 400, {"success": False, "message": read(told)}
    return 200, {"success": True, "message": ""}


dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
serve(answer)
