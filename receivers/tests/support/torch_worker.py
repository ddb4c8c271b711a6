"""A server of one worker that meets the trainer as SGLang's workers do, by torch's own code, and says what it found.

In the place of NCCL stands a backend without communication, for the same kind of device: what the store is asked for,
and with which prefixes, is what torch makes of it.
"""

import datetime
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper

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
    return 200, {"success": True, "message": ""}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            status, said = answer(self.path.split("?")[0], json.loads(text) if text else None)
        except Exception as error:
            status, said = 500, {"message": f"{type(error).__name__}: {error}"}
        said = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *arguments):
        pass


dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
