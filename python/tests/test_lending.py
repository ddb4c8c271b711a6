"""Placed updates: rollouts lend tensors of their own, and trainers write straight into them."""

from __future__ import annotations

import math
import multiprocessing
import os
import time

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine

from ranks import in_thread
from test_processes import as_seen

CONFIG = {"backend": "ipc", "timeout_seconds": 10, "engine_kwargs": {"ipc": {"placed": True}}}
DTYPES = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int64", "uint8", "bool"]
#: By name the dtype and the shape.
SHAPES = {
    **{f"layers.{i}.weight": ("bfloat16", (96, 64)) for i in range(8)},
    **{f"of.{dtype}": (dtype, (3, 5, 7)) for dtype in DTYPES},
    "embed.weight": ("float32", (1024, 300)),
    "scalar": ("float32", ()),
    "empty": ("float32", (0, 4)),
}


def made(shapes, version, device="cpu"):
    """Tensors whose values depend on their names and on the version."""
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        generator = torch.Generator().manual_seed(version * 7919 + sum(name.encode()))
        values = torch.randn(shape, generator=generator) * 3
        tensors[name] = values.to(getattr(torch, dtype)).to(device)
    return tensors


def zeros(shapes, device="cpu"):
    """Tensors to lend: on the CPU in shared memory, of which each is a view in the middle of a larger tensor."""
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        count = math.prod(shape)
        if device == "cpu":
            whole = torch.zeros(count + 5, dtype=getattr(torch, dtype)).share_memory_()
        else:
            whole = torch.zeros(count + 5, dtype=getattr(torch, dtype), device=device)
        tensors[name] = whole[3 : 3 + count].view(shape)
    return tensors


class Placed:
    """What the process of a rollout knows."""

    def __init__(self, control, config, world_size, lend):
        self.model, lent = lend()
        self.engine = ckpt_engine.form_group(control, config, world_size=world_size, lend=lent)
        self.addresses = {name: tensor.data_ptr() for name, tensor in self.model.items()}

    def update(self, version=None):
        return self.engine.update(version)

    def state(self):
        return self.engine.state, self.engine.version

    def look(self):
        """All tensors as (dtype, shape, bytes), and whether they are where they were."""
        moved = [name for name, tensor in self.model.items() if tensor.data_ptr() != self.addresses[name]]
        assert not moved, moved
        return {name: as_seen(tensor.cpu()) for name, tensor in self.model.items()}

    def run(self, function, *arguments):
        return function(self, *arguments)


def serve(address, token, config, world_size, lend, pipe):
    control = ckpt_engine.ControlPlane.join(address, token)
    try:
        rollout = Placed(control, config, world_size, lend)
    except Exception as error:
        pipe.send(error)
        return
    pipe.send(control.rank)
    while (call := pipe.recv()) is not None:
        method, arguments = call
        try:
            pipe.send((True, getattr(rollout, method)(*arguments)))
        except Exception as error:
            pipe.send((False, error))
    rollout.engine.finalize()
    control.close()


class Remote:
    def __init__(self, process, pipe):
        self.process, self.pipe = process, pipe

    def start(self, method, *arguments):
        self.pipe.send((method, arguments))

    def answer(self):
        assert self.pipe.poll(60), "the rollout does not answer"
        fine, value = self.pipe.recv()
        if not fine:
            raise value
        return value

    def call(self, method, *arguments):
        self.start(method, *arguments)
        return self.answer()


class Group:
    """A trainer of this process, and rollouts in others, each of which lends what a function makes there."""

    def __init__(self, *lends, **config):
        self.config = {**CONFIG, **config}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "test_lending"])
        token = ckpt_engine.generate_token()
        self.control = ckpt_engine.ControlPlane.lead("127.0.0.1:0", token)
        self.rollouts = []
        for lend in lends:
            ours, end = context.Pipe()
            arguments = (self.control.address, token, self.config, len(lends) + 1, lend, end)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            end.close()
            self.rollouts.append(Remote(process, ours))
        self.engine = ckpt_engine.form_group(self.control, self.config, world_size=len(lends) + 1)
        for rollout in self.rollouts:
            assert rollout.pipe.poll(60)
            assert isinstance(rollout.pipe.recv(), int)

    def update(self, weights, version):
        for rollout in self.rollouts:
            rollout.start("update", version)
        report = self.engine.send_weights(weights, version)
        for rollout in self.rollouts:
            assert rollout.answer().version == version
        return report

    def end(self):
        for rollout in self.rollouts:
            if rollout.process.is_alive():
                rollout.pipe.send(None)
                rollout.process.join(10)
            rollout.process.kill()
            rollout.process.join()
        self.engine.finalize()
        self.control.close()


@pytest.fixture
def placed():
    groups: list[Group] = []

    def make(*lends, **config):
        groups.append(Group(*lends, **config))
        return groups[-1]

    yield make
    for group in groups:
        group.end()


def seen(tensors):
    return {name: as_seen(tensor.cpu()) for name, tensor in tensors.items()}


def whole():
    model = zeros(SHAPES)
    return model, model


def test_every_byte_of_every_type_is_written_to_where_it_was_lent_in_every_update(placed):
    group = placed(whole, whole)
    for version in (1, 2, 3):
        weights = made(SHAPES, version)
        report = group.update(weights, version)
        assert report.counts.tensors == len(weights)
        assert report.plan_reused == (version > 1)
        for rollout in group.rollouts:
            assert rollout.call("state") == ("active", version)
            assert rollout.call("look") == seen(weights)


def private():
    """Tensors of the process alone, of which no other one can open the memory."""
    model = {name: tensor.clone() for name, tensor in zeros(SHAPES).items()}
    return model, model


def test_tensors_of_the_process_alone_are_written_to_through_staging_memory_and_the_report_says_so(placed):
    group = placed(private, whole)
    for version in (1, 2, 3):
        weights = made(SHAPES, version)
        report = group.update(weights, version)
        for rollout in group.rollouts:
            assert rollout.call("look") == seen(weights)
        (why,) = report.slower
        # All but the one without elements.
        assert f"{len(SHAPES) - 1} tensors" in why and "share_memory_" in why


def halves():
    """The left half of the columns of a tensor, and the last rows of another."""
    model = {"wide": torch.zeros(10, 8).share_memory_(), "tall": torch.zeros(3, 4).share_memory_()}
    lent = {
        "wide": ckpt_engine.Box(model["wide"], (10, 16), (0, 0)),
        "tall": ckpt_engine.Box(model["tall"], (11, 4), (8, 0)),
    }
    return model, lent


def test_a_rollout_lends_parts_of_tensors(placed):
    group = placed(halves)
    for version in (1, 2):
        full = made({"wide": ("float32", (10, 16)), "tall": ("float32", (11, 4))}, version)
        group.update(full, version)
        expected = {"wide": full["wide"][:, :8], "tall": full["tall"][8:]}
        assert group.rollouts[0].call("look") == seen(expected)


NAME = "model.layers.0.mlp.down_proj.weight"


def quantized():
    codes = torch.zeros(256, 640, dtype=torch.float8_e4m3fn).share_memory_()
    scales = torch.zeros(2, 5).share_memory_()
    return {"codes": codes, "scales": scales}, {NAME: ckpt_engine.Fp8(codes, scales)}


def test_weights_are_quantised_as_they_are_written_as_a_trainer_with_buckets_does(placed):
    group = placed(quantized)
    host, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "trainer_quantize_fp8": True})

    def receive():
        with rollout.receive_weights(framework="torch", copy=True) as weights:
            return dict(weights)

    for version in (1, 2):
        weight = made({NAME: ("bfloat16", (256, 640))}, version)
        report = group.update(weight, version)
        assert report.counts.converted == 1
        receiving = in_thread(receive)
        host.send_weights(weight, version)
        expected = receiving.result(10)
        assert group.rollouts[0].call("look") == {
            "codes": as_seen(expected[NAME]),
            "scales": as_seen(expected[f"{NAME}_scale_inv"]),
        }


def two():
    model = {"a": torch.zeros(4, 3).share_memory_(), "b": torch.zeros(5, dtype=torch.int64).share_memory_()}
    return model, model


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"a": torch.ones(4, 3, dtype=torch.bfloat16)}, ckpt_engine.MismatchError, "wanted as F32"),
        ({"a": torch.ones(3, 4)}, ckpt_engine.Error, r"\[3, 4\]|\[4, 3\]"),
        ({"a": None}, ckpt_engine.Error, "nobody|no rank|holds"),
    ],
)
def test_another_dtype_or_shape_or_a_tensor_that_nobody_has_leaves_the_version_that_is_there(
    placed, wrong, kind, words
):
    group = placed(two)
    first = made({"a": ("float32", (4, 3)), "b": ("int64", (5,))}, 1)
    group.update(first, 1)
    bad = {name: tensor for name, tensor in {**first, **wrong}.items() if tensor is not None}
    group.rollouts[0].start("update", 2)
    with pytest.raises(kind, match=words) as failed:
        group.engine.send_weights(bad, 2)
    assert failed.value.tensor == "a"
    with pytest.raises(kind, match=words):
        group.rollouts[0].answer()
    assert group.rollouts[0].call("state") == ("active", 1)
    assert group.rollouts[0].call("look") == seen(first)
    second = made({"a": ("float32", (4, 3)), "b": ("int64", (5,))}, 3)
    group.update(second, 3)
    assert group.rollouts[0].call("look") == seen(second)


def drop(rollout):
    """The program lets go of what it lent."""
    import gc

    rollout.model.clear()
    gc.collect()


def test_memory_is_kept_while_it_is_lent_also_if_the_program_drops_its_tensors(placed):
    group = placed(two)
    weights = made({"a": ("float32", (4, 3)), "b": ("int64", (5,))}, 1)
    group.update(weights, 1)
    group.rollouts[0].call("run", drop)
    group.update(weights, 2)
    assert group.rollouts[0].call("state") == ("active", 2)


def lent_alone():
    model = {"a": torch.zeros(4, 3).share_memory_()}
    return model, model


def replace(rollout, name):
    """The program gives a tensor other memory, and keeps a view of the memory that it had."""
    tensor = rollout.model[name]
    rollout.model["before"] = tensor.detach()
    rollout.addresses["before"] = tensor.data_ptr()
    tensor.data = torch.zeros_like(tensor)
    rollout.addresses[name] = tensor.data_ptr()


def test_the_memory_that_is_lent_stays_when_the_program_gives_a_tensor_other_memory(placed):
    group = placed(lent_alone)
    group.update(made({"a": ("float32", (4, 3))}, 1), 1)
    group.rollouts[0].call("run", replace, "a")
    weights = made({"a": ("float32", (4, 3))}, 2)
    group.update(weights, 2)
    assert group.rollouts[0].call("look") == seen({"a": torch.zeros(4, 3), "before": weights["a"]})


def test_an_array_of_numpy_in_shared_memory_is_lent_also_to_a_trainer_of_the_same_process():
    np = pytest.importorskip("numpy")
    from multiprocessing import shared_memory

    memory = shared_memory.SharedMemory(create=True, size=4096)
    own = np.ndarray((8, 16), np.float32, buffer=memory.buf, offset=64)
    token = ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as leader:

        def rollout():
            with ckpt_engine.ControlPlane.join(leader.address, token) as control:
                with ckpt_engine.form_group(control, CONFIG, lend={"w": own}) as engine:
                    states = [engine.state]
                    engine.update()
                    return [*states, engine.state, engine.version]

        receiving = in_thread(rollout)
        weights = np.random.rand(8, 16).astype(np.float32)
        with ckpt_engine.form_group(leader, CONFIG, world_size=2) as engine:
            engine.send_weights({"w": weights}, 5)
            assert receiving.result(10) == ["empty", "active", 5]
        assert (own == weights).all()
    memory.unlink()


class Serving(ckpt_engine.LocalRollout):
    """A rollout that lends its tensors, and notes with which version it goes on."""

    def __init__(self, engine):
        super().__init__(engine)
        self.resumed = []

    def resume(self, active):
        self.resumed.append((active, self.engine.version))


def test_a_manager_drives_rollouts_that_lend_their_tensors():
    shapes = {"a": ("float32", (64, 33)), "b": ("bfloat16", (5,))}
    lent = zeros(shapes)
    token = ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as leader:

        def rollout():
            control = ckpt_engine.ControlPlane.join(leader.address, token)
            return control, ckpt_engine.form_group(control, CONFIG, lend=lent)

        joining = in_thread(rollout)
        trainer = ckpt_engine.form_group(leader, CONFIG, world_size=2)
        control, engine = joining.result(20)
        with pytest.raises(TypeError, match="lends its tensors"):
            ckpt_engine.LocalRollout(engine, lambda weights: None)
        worker = Serving(engine)
        manager = ckpt_engine.Manager(trainer, [worker])
        for version in (1, 2):
            weights = made(shapes, version)
            _, [report] = manager.update_weights(weights, version)
            assert report.version == version
            assert {name: as_seen(tensor) for name, tensor in lent.items()} == seen(weights)

        def broken():
            yield "a", weights["a"]
            raise RuntimeError("the trainer's disk")

        with pytest.raises(ckpt_engine.SourceError, match="the trainer's disk"):
            manager.update_weights(broken(), 3)
        manager.update_weights(weights, 4)
        # What the third left is a matter of time: the version before it, or none.
        (third, held), fourth = worker.resumed[2:]
        assert worker.resumed[:2] == [(1, 1), (2, 2)] and fourth == (4, 4)
        assert third is None and held in (2, None)
        manager.finalize()
        control.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: torch.zeros(4, 6).share_memory_().t(), "not contiguous"),
        (lambda: torch.zeros(3, device="meta"), "own|tensors of torch"),
        (lambda: ckpt_engine.Fp8(torch.zeros(3).share_memory_(), torch.zeros(1).share_memory_()), "F8_E4M3"),
        (lambda: ckpt_engine.Box(torch.zeros(3).share_memory_(), (4,), (2,)), "not within the shape"),
    ],
)
def test_what_cannot_be_lent_is_refused_by_name_before_the_group_is_formed(given, words):
    token = ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as leader:
        with ckpt_engine.ControlPlane.join(leader.address, token) as control:
            lent = {"fine": torch.zeros(3).share_memory_(), "w.odd": given()}
            with pytest.raises(ckpt_engine.Error, match=words) as refused:
                ckpt_engine.form_group(control, CONFIG, lend=lent)
            assert refused.value.tensor == "w.odd"
            with pytest.raises(ckpt_engine.ConfigError, match="naive has no placed updates"):
                ckpt_engine.form_group(control, {"backend": "naive"}, lend={"fine": lent["fine"]})
        with pytest.raises(ckpt_engine.ConfigError, match="a trainer lends nothing"):
            ckpt_engine.form_group(leader, CONFIG, lend={"fine": lent["fine"]})


def test_tensors_that_share_memory_are_refused():
    token = ckpt_engine.generate_token()
    whole = torch.zeros(8).share_memory_()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as leader:
        with ckpt_engine.ControlPlane.join(leader.address, token) as control:
            with pytest.raises(ckpt_engine.WeightError, match="overlaps") as refused:
                ckpt_engine.form_group(control, CONFIG, lend={"embed": whole, "head": whole[4:]})
            assert refused.value.tensor == "head"


def test_a_rollout_that_is_killed_before_it_enters_is_left_out_and_a_trainer_whose_source_raises_leaves_the_version(placed):
    group = placed(two, two)
    weights = made({"a": ("float32", (4, 3)), "b": ("int64", (5,))}, 1)
    group.update(weights, 1)

    def broken():
        yield "a", weights["a"]
        raise RuntimeError("the trainer's disk")

    for rollout in group.rollouts:
        rollout.start("update", 2)
    time.sleep(0.3)  # All of them have called when the stream breaks off.
    with pytest.raises(ckpt_engine.SourceError, match="the trainer's disk"):
        group.engine.send_weights(broken(), 2)
    for rollout in group.rollouts:
        with pytest.raises(ckpt_engine.SourceError, match="the trainer's disk"):
            rollout.answer()
        assert rollout.call("state") == ("active", 1)
    group.update(weights, 3)
    group.rollouts[0].start("update", 4)
    sending = in_thread(group.engine.send_weights, weights, 4)
    with pytest.raises(TimeoutError):
        sending.result(0.5)  # The other rollout has not entered.
    group.rollouts[1].process.kill()
    # Nobody had planned to write to it: the other one is updated without it.
    assert len(sending.result(10).absent) == 1
    group.rollouts[0].answer()
    assert group.rollouts[0].call("state") == ("active", 4)
    group.rollouts.pop(1).process.join()
    group.update(weights, 5)
    assert group.rollouts[0].call("state") == ("active", 5)


# Trainers whose tensors are DTensors of a mesh of two.

SHARDED = {"rows": ("float32", (11, 6)), "columns": ("bfloat16", (6, 10)), "both": ("float32", (4, 4))}


def dtensors(version, mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    full = made(SHARDED, version)
    places = {"rows": Shard(0), "columns": Shard(-1), "both": Replicate()}
    return {name: distribute_tensor(full[name], mesh, [places[name]]) for name in full}


def shard_trainer(rank, port, address, token, versions, pipe):
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        dist.init_process_group("gloo", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        if rank == 0:
            control = ckpt_engine.ControlPlane.lead(address, token)
        else:
            control = ckpt_engine.ControlPlane.join(address, token, role="trainer", rank=1)
        with control, ckpt_engine.form_group(control, CONFIG, world_size=3) as engine:
            updates = [dtensors(version, mesh) for version in versions]
            pipe.send("ready")
            for version, tensors in zip(versions, updates):
                engine.send_weights(tensors, version)
            pipe.send(None)
        dist.destroy_process_group()
    except Exception as error:
        pipe.send(error)


def lent_shards():
    """What a rollout with other parts than the trainers' wants."""
    model = {
        "rows": torch.zeros(11, 3).share_memory_(),
        "columns": torch.zeros(6, 10, dtype=torch.bfloat16).share_memory_(),
        "both": torch.zeros(4, 4).share_memory_(),
    }
    return model, {**model, "rows": ckpt_engine.Box(model["rows"], (11, 6), (0, 2))}


def test_dtensors_of_two_trainers_are_written_to_what_the_rollout_wants_of_them():
    import socket

    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "test_lending"])
    address = f"unix:@ckpt-engine-lending-{time.monotonic_ns()}"
    token, versions = ckpt_engine.generate_token(), (1, 2)
    ranks = []
    for rank in (0, 1):
        ours, end = context.Pipe()
        arguments = (rank, port, address, token, versions, end)
        process = context.Process(target=shard_trainer, args=arguments, daemon=True)
        process.start()
        ranks.append((process, ours))
    control = ckpt_engine.ControlPlane.join(address, token)
    model, lent = lent_shards()
    with control, ckpt_engine.form_group(control, CONFIG, lend=lent) as rollout:
        for _, pipe in ranks:
            assert pipe.poll(60)
            assert pipe.recv() == "ready"
        for version in versions:
            assert rollout.update(version).version == version
            full = made(SHARDED, version)
            assert seen(model) == seen({**full, "rows": full["rows"][:, 2:5].contiguous()})
    for process, pipe in ranks:
        assert pipe.poll(30)
        assert pipe.recv() is None
        process.join(10)
