"""Tensors on GPUs: sent where they are, received where they are used, in the order of the streams that write and read
them. Skipped where there is no GPU; with CKPT_ENGINE_REQUIRE_ALL=1 that is a failure."""

from __future__ import annotations

import os

import pytest

# Streams that share one of a GPU's queues wait for one another, also for a long kernel, and there are eight of them unless this
# says more. For this process and those that it starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

torch = pytest.importorskip("torch")

import ckpt_engine

import test_lending
from test_destinations import made_for
from test_lending import SHAPES, made, placed, seen, zeros  # noqa: F401
from test_processes import as_seen

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
    torch.bool,
]

#: As many cycles of a GPU as a second has, about.
LONG = 2_000_000_000


def need(is_there, what):
    if not is_there:
        (pytest.fail if os.environ.get("CKPT_ENGINE_REQUIRE_ALL") == "1" else pytest.skip)(what)


@pytest.fixture(autouse=True)
def gpu():
    # `cargo xtask setup` installs torch with empty libraries of CUDA, in which every call ends the process.
    driver = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
    need(driver and torch.cuda.is_available(), "there is no CUDA device")


@pytest.fixture
def gpus():
    need(torch.cuda.device_count() > 1, "there are not two CUDA devices")


def model(seed, device="cuda:0"):
    torch.manual_seed(seed)
    weights = {f"layers.{i}.weight": torch.randn(64, 96, device=device, dtype=torch.bfloat16) for i in range(40)}
    # Larger than a bucket.
    weights["embed.weight"] = torch.randn(1024, 1100, device=device)
    for dtype in DTYPES:
        weights[f"of.{dtype}"] = (torch.rand(3, 5, 7, device=device) * 2).to(dtype)
    weights["empty"] = torch.zeros(0, 4, device=device)
    weights["parameter"] = torch.nn.Parameter(torch.randn(9, 9, device=device))
    weights["on.the.host"] = torch.randn(8, 8)
    return weights


def devices(rollout):
    return {str(tensor.device) for tensor in rollout.model.values()}


def check(group, weights, device="cuda:0"):
    for rollout in group.rollouts:
        assert rollout.call("names") == list(weights)
        assert rollout.call("run", devices) == {device}
        for name, tensor in weights.items():
            assert rollout.call("run", look, name) == as_seen(tensor.cpu()), name


def look(rollout, name):
    return as_seen(rollout.model[name].cpu())


@pytest.mark.parametrize("copy", [False, True])
def test_every_type_on_a_gpu_arrives_there_bit_for_bit_in_every_update(group, copy):
    group = group(rollouts=2, device="cuda:0")
    for version in (1, 2, 3):
        weights = model(version)
        report = group.update(weights, version, copy=copy)
        assert report.counts.tensors == len(weights)
        check(group, weights)


def make(rollout, shapes):
    rollout.model = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device="cpu" if name == "on.the.host" else "cuda:0")
        for name, (dtype, shape) in shapes.items()
    }
    rollout.addresses = {name: tensor.data_ptr() for name, tensor in rollout.model.items()}
    return True


def are_where_they_were(rollout):
    return all(tensor.data_ptr() == rollout.addresses[name] for name, tensor in rollout.model.items())


def test_an_update_is_copied_into_tensors_on_a_gpu_and_on_the_host(group):
    group = group(rollouts=2, device="cuda:0")
    for rollout in group.rollouts:
        assert rollout.call("run", make, made_for(model(0)))
    for version in (1, 2, 3):
        weights = model(version)
        group.update(weights, version, method="receive_into")
        for rollout in group.rollouts:
            assert rollout.call("run", are_where_they_were)
            for name, tensor in weights.items():
                assert rollout.call("run", look, name) == as_seen(tensor.cpu()), name


def read_before(rollout, version):
    """Has a tensor read behind a long kernel, and then written by an update; what was read."""
    own, copy = rollout.model["w"], torch.zeros_like(rollout.model["w"])
    torch.cuda._sleep(LONG)
    copy.copy_(own)
    rollout.receive_into(version)
    return copy.unique().tolist(), own.unique().tolist()


def test_an_update_waits_for_the_work_that_reads_the_tensors_it_is_copied_into(group):
    group = group(device="cuda:0")
    assert group.rollouts[0].call("run", make, {"w": ("float32", (1 << 18,))})
    for version in (1, 2, 3):
        group.rollouts[0].start("run", read_before, version)
        group.engine.send_weights({"w": torch.full((1 << 18,), float(version), device="cuda:0")}, version)
        assert group.rollouts[0].answer() == ([float(version - 1)], [float(version)])


def test_tensors_of_torch_and_arrays_of_cupy_are_read_where_they_are(group):
    tensor = torch.ones(256, device="cuda:0", dtype=torch.bfloat16)
    seen = torch.from_dlpack(ckpt_engine.Tensor(tensor))
    assert seen.data_ptr() == tensor.data_ptr() and seen.dtype == tensor.dtype
    try:
        import cupy
    except ImportError:
        need(False, "there is no cupy")
    array = cupy.arange(12, dtype=cupy.float32).reshape(3, 4)
    assert torch.from_dlpack(ckpt_engine.Tensor(array)).data_ptr() == array.data.ptr
    assert cupy.from_dlpack(ckpt_engine.Tensor(array)).data.ptr == array.data.ptr
    group = group(device="cuda:0")
    for version in (1, 2):
        array += 1
        group.update({"of.cupy": array, "of.torch": tensor}, version)
        assert group.rollouts[0].call("run", look, "of.cupy") == as_seen(torch.from_dlpack(array).cpu())


def test_what_the_current_stream_is_about_to_write_is_what_travels(group):
    group, side = group(device="cuda:0", update_weights_bucket_megabytes=64), torch.cuda.Stream()
    weights = {f"w.{i}": torch.zeros(1 << 20, device="cuda:0") for i in range(8)}
    for tensor in weights.values():
        tensor.fill_(0)
    torch.cuda.synchronize()
    for version in (1, 2):
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG)
            for tensor in weights.values():
                tensor.fill_(version)
            assert not side.query()
            group.update(weights, version)
        assert group.rollouts[0].call("run", values) == {float(version)}


def test_a_generator_that_writes_on_another_stream_for_each_tensor(group):
    group = group(device="cuda:0")

    def weights(version):
        for i in range(6):
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(LONG // 8)
                yield f"w.{i}", torch.full((1 << 16,), float(version), device="cuda:0")

    for version in (1, 2):
        group.update(weights(version), version)
        assert group.rollouts[0].call("run", values) == {float(version)}


def values(rollout):
    return {value for tensor in rollout.model.values() for value in tensor.unique().tolist()}


def read_later(rollout, version):
    """Has every tensor of an update copied behind a long kernel, and waits for nothing; whether that has not run."""
    if not hasattr(rollout, "stream"):
        rollout.stream = torch.cuda.Stream()
        rollout.copies = {v: torch.zeros(12, 1 << 18, device="cuda:0") for v in (2, 3, 4)}
        torch.cuda.synchronize()
    with torch.cuda.stream(rollout.stream):
        torch.cuda._sleep(3 * LONG)  # Also where the GPU and the host have other work.
        with rollout.engine.receive_weights(version, framework="torch") as weights:
            for number, (_, tensor) in enumerate(weights):
                rollout.copies[version][number].copy_(tensor, non_blocking=True)
                del tensor
    return not rollout.stream.query()


def copied(rollout):
    torch.cuda.synchronize()
    return {version: copies.unique().tolist() for version, copies in rollout.copies.items()}


def test_a_bucket_is_not_filled_again_under_the_kernels_that_read_it(group):
    # All weights of an update fit into the buckets: only the next one fills them again.
    group = group(device="cuda:0", update_weights_bucket_megabytes=8)
    for version in (1, 2, 3, 4):
        weights = {f"w.{i}": torch.full((1 << 18,), float(version), device="cuda:0") for i in range(12)}
        if version == 1:
            group.update(weights, version)  # Kernels are loaded, which would wait for a long one.
            continue
        group.rollouts[0].start("run", read_later, version)
        report = group.engine.send_weights(weights, version)
        assert group.rollouts[0].answer(), f"the kernel was too short for this test: version {version}, {report}"
    assert group.rollouts[0].call("run", copied) == {2: [2.0], 3: [3.0], 4: [4.0]}


def test_the_last_tensor_of_a_loop_does_not_hold_its_bucket(group):
    group = group(device="cuda:0")
    for version in (1, 2):
        group.rollouts[0].start("run", loop, version)
        group.engine.send_weights(model(version), version)
        assert group.rollouts[0].answer()


def loop(rollout, version):
    with rollout.engine.receive_weights(version, framework="torch") as weights:
        for _, rollout.last in weights:
            pass
    return True


def test_fp8_blocks_that_a_gpu_makes_are_those_of_the_cpu(group):
    group = group(device="cuda:0", trainer_quantize_fp8=True)
    name = "model.layers.0.mlp.down_proj.weight"
    host, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "trainer_quantize_fp8": True})
    from ranks import in_thread

    def receive():
        with rollout.receive_weights(framework="torch", copy=True) as weights:
            return dict(weights)

    for version in (1, 2):
        torch.manual_seed(version)
        weight = torch.randn(256, 384).to(torch.bfloat16)
        report = group.update({name: weight.cuda(), "model.norm.weight": torch.ones(384).cuda()}, version)
        assert (report.counts.converted, report.counts.kept) == (1, 1)
        receiving = in_thread(receive)
        host.send_weights({name: weight, "model.norm.weight": torch.ones(384)}, version)
        for each, tensor in receiving.result(10).items():
            assert group.rollouts[0].call("run", look, each) == as_seen(tensor), each
    assert group.rollouts[0].call("run", devices) == {"cuda:0"}


def test_a_tensor_whose_elements_are_apart_is_refused_by_name_and_the_next_update_works(group):
    group = group(device="cuda:0")
    apart = torch.randn(64, 64, device="cuda:0").t()
    group.rollouts[0].start("receive", 1)
    with pytest.raises(ckpt_engine.WeightError, match="contiguous") as failed:
        group.engine.send_weights({"w.apart": apart}, 1)
    assert failed.value.tensor == "w.apart"
    with pytest.raises(ckpt_engine.Error):
        group.rollouts[0].answer()
    group.update({"w.apart": apart.contiguous()}, 2)
    assert group.rollouts[0].call("run", look, "w.apart") == as_seen(apart.cpu())


def test_a_trainer_and_a_rollout_on_two_gpus_and_programs_that_choose_their_own(group, gpus):
    group = group(device="cuda:1", theirs={"device": "cuda:0"})
    torch.cuda.set_device(0)
    chosen = []

    def weights(version):
        for name, tensor in model(version, "cuda:1").items():
            yield name, tensor
            chosen.append(torch.cuda.current_device())

    for version in (1, 2):
        group.update(weights(version), version)
        check(group, model(version, "cuda:1"))
    assert set(chosen) == {0}, "the engine changed the program's current device"


@pytest.mark.parametrize("fp8", [False, True])
def test_nccl_between_processes_on_two_gpus(group, gpus, fp8):
    group = group(
        backend="nccl", device="cuda:0", theirs={"device": "cuda:1"}, timeout_seconds=60, trainer_quantize_fp8=fp8,
    )
    for version in (1, 2):
        weights = model(version)
        if fp8:
            # FP8 without scales is refused where weights are to become FP8.
            weights = {name: tensor for name, tensor in weights.items() if "float8" not in name}
        report = group.update(weights, version)
        assert report.version == version
        if not fp8:
            check(group, weights, "cuda:1")
        assert group.rollouts[0].call("run", devices) == {"cuda:1"}


def lent(rollout_shapes=SHAPES):
    """Tensors of torch's caching allocator, of which several are in an allocation of the driver."""
    own = zeros(rollout_shapes, "cuda:0")
    return own, own


@pytest.mark.parametrize("where", ["cuda:0", "cpu"])
def test_trainers_write_straight_into_tensors_that_torch_has_allocated(placed, where):
    group = placed(lent, lent, device="cuda:0")
    for version in (1, 2, 3):
        weights = made(SHAPES, version, where)
        group.update(weights, version)
        for rollout in group.rollouts:
            assert rollout.call("state") == ("active", version)
            assert rollout.call("look") == seen(weights)


BLOCKS = {f"model.layers.{i}.mlp.down_proj.weight": ("bfloat16", (256 + 128 * i, 640)) for i in range(3)}


def lent_fp8():
    own, parts = {}, {}
    for name, (_, (rows, columns)) in BLOCKS.items():
        own[name] = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn, device="cuda:0")
        own[f"{name}_scale_inv"] = torch.zeros(rows // 128, columns // 128, device="cuda:0")
        parts[name] = ckpt_engine.Fp8(own[name], own[f"{name}_scale_inv"])
    return own, parts


def lent_columns():
    """The right columns of quantised tensors, whose scales lie apart from their codes."""
    own, parts = {}, {}
    for name, (_, (rows, columns)) in BLOCKS.items():
        own[name] = torch.zeros(rows, 256, dtype=torch.float8_e4m3fn, device="cuda:0")
        own[f"{name}_scale_inv"] = torch.zeros(rows // 128, 2, device="cuda:0")
        box = ckpt_engine.Box(own[name], (rows, columns), (0, columns - 256))
        parts[name] = ckpt_engine.Fp8(box, own[f"{name}_scale_inv"])
    return own, parts


def test_trainers_quantise_straight_into_tensors_that_torch_has_allocated(placed):
    group = placed(lent_fp8, lent_columns, device="cuda:0")
    host, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "trainer_quantize_fp8": True})
    from ranks import in_thread

    def receive():
        with rollout.receive_weights(framework="torch", copy=True) as weights:
            return dict(weights)

    for version in (1, 2, 3):
        weights = made(BLOCKS, version)
        report = group.update({name: tensor.cuda() for name, tensor in weights.items()}, version)
        assert (report.counts.converted, report.slower) == (len(BLOCKS), ())
        receiving = in_thread(receive)
        host.send_weights(weights, version)
        expected = receiving.result(10)
        assert group.rollouts[0].call("look") == seen(expected)
        right = {}
        for name, tensor in expected.items():
            kept = 2 if name.endswith("_scale_inv") else 256
            right[name] = tensor.view(torch.uint8)[:, -kept * tensor.element_size() :].contiguous().view(tensor.dtype)
        assert group.rollouts[1].call("look") == seen(right)


def lent_expandable():
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    return lent()


@pytest.mark.parametrize("where", ["cuda:0", "cpu"])
def test_memory_that_the_driver_does_not_export_is_written_to_through_staging_memory(placed, where):
    group = placed(lent_expandable, lent, device="cuda:0")
    for version in (1, 2, 3):
        weights = made(SHAPES, version, where)
        report = group.update(weights, version)
        for rollout in group.rollouts:
            assert rollout.call("look") == seen(weights)
        assert sum("expandable segments" in why for why in report.slower) == 1


def lent_on_the_host():
    own = {"w": torch.zeros(4).share_memory_()}
    return own, own


@pytest.mark.parametrize(
    ("lend", "kind", "words"),
    [
        (lent_on_the_host, ckpt_engine.MismatchError, "not on device 0"),
    ],
)
def test_memory_that_trainers_could_not_reach_is_refused_by_name(lend, kind, words):
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    token = ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as leader:
        ours, end = context.Pipe()
        config = {**test_lending.CONFIG, "device": "cuda:0"}
        arguments = (leader.address, token, config, 2, lend, end)
        process = context.Process(target=test_lending.serve, args=arguments, daemon=True)
        process.start()
        assert ours.poll(60)
        error = ours.recv()
        process.join(10)
    assert isinstance(error, kind), error
    assert error.tensor == "w" and words in str(error)


def free(rollout, name):
    """The program frees the memory of a tensor under it, as FSDP does with gathered parameters."""
    rollout.model[name].untyped_storage().resize_(0)


def lent_alone():
    own = {"a": torch.zeros(1 << 20, device="cuda:0"), "b": torch.zeros(5, device="cuda:0")}
    return own, own


def test_a_tensor_whose_memory_was_freed_is_named_and_nothing_is_written(placed):
    group = placed(lent_alone, device="cuda:0")
    weights = {"a": torch.ones(1 << 20, device="cuda:0"), "b": torch.ones(5, device="cuda:0")}
    group.update(weights, 1)
    group.rollouts[0].call("run", free, "a")
    with pytest.raises(ckpt_engine.StateError, match="freed or moved") as freed:
        group.rollouts[0].call("update", 2)
    assert freed.value.tensor == "a"
    assert group.rollouts[0].call("state") == ("active", 1)


def read_then_update(rollout, version):
    """Has a tensor read behind a long kernel, and then written by an update; what was read."""
    own = rollout.model["a"]
    copy = torch.zeros_like(own)
    torch.cuda._sleep(LONG)
    copy.copy_(own)
    rollout.update(version)
    return copy.unique().tolist(), own.unique().tolist()


def test_an_update_waits_for_the_work_that_reads_the_tensors_that_are_lent(placed):
    group = placed(lent_alone, device="cuda:0")
    for version in (1, 2, 3):
        group.rollouts[0].start("run", read_then_update, version)
        a = torch.full((1 << 20,), float(version), device="cuda:0")
        group.engine.send_weights({"a": a, "b": torch.ones(5, device="cuda:0")}, version)
        assert group.rollouts[0].answer() == ([float(version - 1)], [float(version)])
