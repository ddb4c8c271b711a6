"""A trainer's process and those of its rollouts, with tensors of torch over shared memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def model(seed: int, layers: int = 40) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    weights = {f"layers.{i}.weight": torch.randn(64, 96).to(torch.bfloat16) for i in range(layers)}
    # Larger than a bucket.
    weights["embed.weight"] = torch.randn(1024, 640)
    for dtype in DTYPES:
        weights[f"of.{dtype}"] = (torch.rand(3, 5, 7) * 2).to(dtype)
    weights["scalar"] = torch.tensor(2.5)
    weights["empty"] = torch.zeros(0, 4)
    weights["transposed"] = torch.randn(33, 17).t()
    weights["every.second"] = torch.arange(100, dtype=torch.int32)[::2]
    weights["parameter"] = torch.nn.Parameter(torch.randn(9, 9))
    return weights


def as_seen(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    tensor = tensor.detach().contiguous()
    return str(tensor.dtype), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes() if (
        tensor.dim()
    ) else tensor.reshape(1).view(torch.uint8).numpy().tobytes()


def check(group, weights: dict[str, torch.Tensor]) -> None:
    for rollout in group.rollouts:
        assert rollout.call("names") == list(weights)
        for name, tensor in weights.items():
            if tensor.dim():
                assert rollout.call("look", name) == as_seen(tensor), name


def test_every_type_and_layout_of_torch_arrives_bit_for_bit_in_every_update(group):
    group = group(rollouts=2)
    for version in (1, 2, 3):
        weights = model(version)
        report = group.update(weights, version)
        assert report.version == version
        assert [receiver.rank for receiver in report.receivers] == [1, 2]
        assert {receiver.state for receiver in report.receivers} == {"active"}
        assert report.counts.tensors == len(weights)
        check(group, weights)
        assert [rollout.call("version") for rollout in group.rollouts] == [version] * 2
    assert report.plan_reused


def test_tensors_can_be_taken_a_bucket_at_a_time(group):
    group = group(rollouts=2)
    for version in (1, 2, 3):
        weights = model(version)
        group.update(weights, version, method="receive_buckets")
        check(group, weights)


def test_a_generator_is_pulled_lazily_and_its_tensors_are_given_back(group):
    import weakref

    group = group()
    alive, most = weakref.WeakSet(), 0

    def weights():
        nonlocal most
        for i in range(64):
            tensor = torch.full((1024, 1024), float(i))  # 4 MiB
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"w.{i}", tensor

    report = group.update(weights(), 1)
    assert report.counts.source_bytes == 64 << 22
    # 64 MiB wait for the engine, and it has two buckets of 1 MiB; the rest is what waits to be freed.
    assert most <= 36, f"{most} of 64 tensors were alive at once"


def test_fp8_blocks_and_their_scales_are_what_the_trainer_was_asked_to_send(group):
    group = group(trainer_quantize_fp8=True)
    torch.manual_seed(0)
    weight = torch.randn(256, 384).to(torch.bfloat16)
    name = "model.layers.0.mlp.down_proj.weight"
    kept = "model.norm.weight"
    for version in (1, 2):
        report = group.update({name: weight, kept: torch.ones(384, dtype=torch.bfloat16)}, version)
        assert (report.counts.converted, report.counts.kept) == (1, 1)
        dtype, shape, codes = group.rollouts[0].call("look", name)
        assert (dtype, shape) == ("torch.float8_e4m3fn", (256, 384))
        codes = torch.frombuffer(bytearray(codes), dtype=torch.float8_e4m3fn).view(shape)
        dtype, shape, scales = group.rollouts[0].call("look", name + "_scale_inv")
        assert (dtype, shape) == ("torch.float32", (2, 3))
        scales = torch.frombuffer(bytearray(scales), dtype=torch.float32).view(shape)
        scales = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        back = codes.float() * scales
        # Three bits after the point: half a step is a sixteenth.
        assert ((back - weight.float()).abs() <= weight.float().abs() / 15 + 0.001).all()
        assert group.rollouts[0].call("look", kept)[0] == "torch.bfloat16"


def test_a_rollout_on_an_event_loop_receives_what_a_blocking_trainer_sends(group):
    group = group(rollouts=2)
    for version in (1, 2):
        weights = model(version, 5)
        group.update(weights, version, method="receive_async")
        check(group, weights)


def test_a_trainer_on_an_event_loop_sends_plain_and_asynchronous_iterators(group):
    import asyncio

    group = group()
    weights = model(0, 5)

    async def slowly():
        for item in weights.items():
            await asyncio.sleep(0)
            yield item

    def sources():
        return [weights, iter(weights.items()), slowly(), ckpt_engine.in_thread(weights)]

    async def run():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        for version, source in enumerate(sources(), 1):
            group.rollouts[0].start("receive", version)
            report = await group.engine.send_weights_async(source, version)
            assert report.counts.tensors == len(weights)
            group.rollouts[0].answer()
        ticker.cancel()
        return ticks

    assert asyncio.run(run()) > 4, "the loop goes on meanwhile"
    # Another loop, the same engine.
    group.rollouts[0].start("receive", 9)
    assert asyncio.run(group.engine.send_weights_async(weights, 9)).version == 9
    group.rollouts[0].answer()
    check(group, weights)


def test_what_an_iterator_raises_is_raised_and_ends_the_update_everywhere(group):
    group = group(rollouts=2)
    weights = model(1, 5)
    group.update(weights, 1)

    def fails():
        yield from list(weights.items())[:3]
        raise KeyError("shard 3 is gone")

    for rollout in group.rollouts:
        rollout.start("receive", 2)
    with pytest.raises(ckpt_engine.SourceError, match="shard 3 is gone") as raised:
        group.engine.send_weights(fails(), 2)
    assert isinstance(raised.value.__cause__, KeyError)
    assert (raised.value.version, raised.value.recovery) == (2, "Retry")
    for rollout in group.rollouts:
        with pytest.raises(ckpt_engine.SourceError, match="shard 3 is gone"):
            rollout.answer()
        assert rollout.call("version") == 1
    group.update(weights, 3)
    check(group, weights)


def test_what_a_rollout_raises_is_an_error_of_the_trainer_that_names_the_rank(group):
    group = group(rollouts=2)
    weights = model(1, 5)
    for method, words in [
        ("raise_within", "the model does not want it"),
        ("stop_early", "left the update before its end"),
    ]:
        group.rollouts[0].start("receive", 1)
        group.rollouts[1].start(method)
        with pytest.raises(ckpt_engine.AbortedError, match=words) as raised:
            group.engine.send_weights(weights, 1)
        assert raised.value.rank == group.rollouts[1].rank
        with pytest.raises(ckpt_engine.AbortedError, match=words):
            group.rollouts[0].answer()
        with pytest.raises((RuntimeError, ckpt_engine.AbortedError)):
            group.rollouts[1].answer()
    assert group.update(weights, 2).version == 2


def test_a_rollout_that_leaves_while_the_trainer_waits_for_its_bucket_is_heard_at_once(group):
    import time

    group = group()
    # Many buckets: the trainer cannot go on while the rollout has the first two.
    weights = {f"w.{i}": torch.zeros(1024, 128) for i in range(16)}
    for version, method in [(1, "raise_within"), (2, "stop_early")]:
        start = time.monotonic()
        group.rollouts[0].start(method, pause=0.5)
        with pytest.raises(ckpt_engine.AbortedError):
            group.engine.send_weights(weights, version)
        assert time.monotonic() - start < 5
        with pytest.raises((RuntimeError, ckpt_engine.AbortedError)):
            group.rollouts[0].answer()
    group.update(weights, 3)


def test_a_rollout_that_is_killed_is_named_and_the_others_get_the_next_update(group):
    import time

    group = group(rollouts=2)
    weights = model(1, 5)
    group.update(weights, 1)
    first, second = group.rollouts

    def kills():
        for i, item in enumerate(weights.items()):
            if i == 3:
                second.kill()
                time.sleep(0.2)
            yield item

    first.start("receive", 2)
    second.start("hold_first")
    with pytest.raises(ckpt_engine.PeerLost) as raised:
        group.engine.send_weights(kills(), 2)
    assert (raised.value.rank, raised.value.version) == (second.rank, 2)
    with pytest.raises(ckpt_engine.PeerLost) as raised:
        first.answer()
    assert raised.value.rank == second.rank

    first.start("receive", 3)
    report = group.engine.send_weights(weights, 3)
    assert first.answer().version == 3
    assert [receiver.rank for receiver in report.receivers] == [first.rank]
    assert report.absent == (second.rank,)


def test_a_rollout_that_keeps_a_tensor_ends_the_update_with_its_rank_at_the_deadline(group):
    group = group(timeout_seconds=1)
    group.rollouts[0].start("hold_first")
    weights = {f"w.{i}": torch.zeros(1024, 256) for i in range(16)}
    with pytest.raises(ckpt_engine.TimeoutError) as raised:
        group.engine.send_weights(weights, 1)
    assert (raised.value.rank, raised.value.kind) == (group.rollouts[0].rank, "Timeout")
    assert isinstance(raised.value, TimeoutError), "it is Python's own as well"


def test_a_rollout_that_still_has_tensors_of_the_version_before_is_told_so_at_once(group):
    group = group()
    weights = {f"layers.{i}.weight": torch.randn(64, 96) for i in range(5)}
    group.rollouts[0].start("keep", "layers.1.weight")
    group.engine.send_weights(weights, 1)
    group.rollouts[0].answer()
    with pytest.raises(ckpt_engine.StateError, match="1 tensors of an earlier update are still used"):
        group.rollouts[0].call("receive", 2)
    group.rollouts[0].call("drop")
    group.update(weights, 2)


def test_an_update_without_all_names_is_refused_unless_the_rollout_takes_parts(group):
    group = group()
    weights = model(1, 5)
    group.update(weights, 1)
    part = {"scalar": weights["scalar"]}
    group.rollouts[0].start("receive", 2)
    with pytest.raises(ckpt_engine.MismatchError):
        group.engine.send_weights(part, 2)
    with pytest.raises(ckpt_engine.MismatchError):
        group.rollouts[0].answer()
    assert group.rollouts[0].call("version") == 1
    group.update(part, 3, partial=True)


def test_a_version_that_nobody_waits_for_is_a_mismatch(group):
    group = group()
    group.rollouts[0].start("receive", 7)
    with pytest.raises(ckpt_engine.MismatchError):
        group.engine.send_weights(model(1, 2), 6)
    with pytest.raises(ckpt_engine.MismatchError) as raised:
        group.rollouts[0].answer()
    assert "7" in str(raised.value)


def test_the_errors_of_a_tensor_name_it_and_say_what_to_do(group):
    group = group()
    meta = torch.empty(3, device="meta")
    for tensor, words in [
        (meta, "meta"),
        (torch.zeros(4, 4).to_sparse(), "[Ss]parse|storage|layout"),
        (torch.zeros(3, dtype=torch.complex128), "complex128"),
        (object(), "object"),
    ]:
        group.rollouts[0].start("receive", 1)
        with pytest.raises(ckpt_engine.WeightError, match=words) as raised:
            group.engine.send_weights({"bad.weight": tensor}, 1)
        assert raised.value.tensor == "bad.weight"
        with pytest.raises(ckpt_engine.Error, match="bad.weight"):
            group.rollouts[0].answer()
    with pytest.raises(ckpt_engine.Error, match="name, tensor"):
        group.rollouts[0].start("receive", 1)
        group.engine.send_weights([torch.zeros(3)], 1)
