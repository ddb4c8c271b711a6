"""Updates into tensors of a program's own."""

from __future__ import annotations

import asyncio

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

import ckpt_engine

from ranks import in_thread
from test_processes import as_seen, check, model


def made_for(weights):
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in weights.items()}


def update(trainer, rollout, destination, weights, version):
    """One update within the process: both reports."""
    receiving = in_thread(rollout.receive_into, destination, version)
    sent = trainer.send_weights(weights, version)
    return sent, receiving.result(10)


def test_every_type_arrives_bit_for_bit_in_the_same_tensors_in_every_update(group):
    group = group(rollouts=2)
    for rollout in group.rollouts:
        rollout.call("make", made_for(model(0)))
    for version in (1, 2, 3):
        weights = model(version)
        report = group.update(weights, version, method="receive_into")
        assert report.counts.tensors == len(weights)
        check(group, weights)
        assert [rollout.call("version") for rollout in group.rollouts] == [version] * 2
    # Other ways to receive go on from there.
    group.update(model(4), 4)


def test_arrays_of_numpy_are_filled_where_they_are(local):
    trainer, rollout = local
    own = {"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.int64), "none": np.zeros((0, 2), np.float16)}
    destination = ckpt_engine.Destination(own.items())
    for version in (1, 2):
        weights = {name: (np.random.rand(*array.shape) * 9).astype(array.dtype) for name, array in own.items()}
        sent, received = update(trainer, rollout, destination, weights, version)
        assert (sent.version, received.version, rollout.version) == (version, version, version)
        assert all((own[name] == weights[name]).all() for name in own)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (lambda: torch.zeros(4, 6).t(), "not contiguous"),
        (lambda: torch.zeros(1).expand(9), "not contiguous"),
        (lambda: torch.zeros(4, device="meta"), "own|tensors of torch"),
        (lambda: np.zeros((4, 6))[:, ::2], "not contiguous"),
        (lambda: np.broadcast_to(np.zeros(1), 9), "not contiguous"),
        (lambda: np.frombuffer(b"12345678", np.uint8), "read-only"),
        (lambda: bytearray(8), "this is bytearray"),
        (lambda: ckpt_engine.Tensor(torch.zeros(3)), "tensors of torch"),
    ],
)
def test_what_cannot_be_written_to_is_refused_by_name(given, why):
    with pytest.raises(ckpt_engine.WeightError, match=why) as refused:
        ckpt_engine.Destination({"fine": torch.zeros(3), "w.odd": given()})
    assert refused.value.tensor == "w.odd"


def test_tensors_that_share_memory_or_a_name_are_refused():
    whole = torch.zeros(8)
    with pytest.raises(ckpt_engine.WeightError, match="shares memory with `embed`") as refused:
        ckpt_engine.Destination({"embed": whole, "other": torch.zeros(8), "head": whole[4:]})
    assert refused.value.tensor == "head"
    with pytest.raises(ckpt_engine.WeightError, match="one name"):
        ckpt_engine.Destination([("a", torch.zeros(2)), ("a", torch.zeros(2))])
    # Neighbours do not.
    ckpt_engine.Destination({"first": whole[:4], "second": whole[4:], "none": whole[4:4]})


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"a": torch.ones(3), "b": torch.ones(2, 2)}, r"it is F32 \[3\].*F32 \[4\]"),
        ({"a": torch.ones(4, dtype=torch.float64), "b": torch.ones(2, 2)}, r"it is F64 \[4\].*F32 \[4\]"),
        ({"a": torch.ones(4), "b": torch.ones(2, 2), "c": torch.ones(1)}, "no tensor of this name"),
        ({"a": torch.ones(4)}, r"1 are missing \(`b`\)"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_on_every_rank_and_the_next_one_works(local, weights, why):
    trainer, rollout = local
    own = {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
    destination = ckpt_engine.Destination(own)
    receiving = in_thread(rollout.receive_into, destination)
    with pytest.raises(ckpt_engine.MismatchError, match=why):
        trainer.send_weights(weights, 1)
    with pytest.raises(ckpt_engine.MismatchError, match=why):
        receiving.result(10)
    assert rollout.version is None
    update(trainer, rollout, destination, {"a": torch.ones(4), "b": torch.ones(2, 2)}, 2)
    assert own["a"].tolist() == [1.0] * 4 and rollout.version == 2


def test_a_partial_destination_gets_parts_and_the_rest_stays(local):
    trainer, rollout = local
    own = {"a": torch.zeros(4), "b": torch.zeros(2)}
    destination = ckpt_engine.Destination(own, partial=True)
    update(trainer, rollout, destination, {"b": torch.ones(2)}, 1)
    update(trainer, rollout, destination, {"a": torch.ones(4) * 2}, 2)
    assert own["a"].tolist() == [2.0] * 4 and own["b"].tolist() == [1.0] * 2


def test_the_memory_of_a_destination_stays_when_the_program_gives_a_tensor_other_memory(local):
    trainer, rollout = local
    parameter = torch.nn.Parameter(torch.zeros(1 << 20))
    before = parameter.data
    destination = ckpt_engine.Destination({"w": parameter})
    parameter.data = torch.zeros(1 << 20)
    update(trainer, rollout, destination, {"w": torch.ones(1 << 20)}, 1)
    assert before.sum() == 1 << 20 and parameter.sum() == 0


def test_one_destination_serves_one_update_at_a_time():
    trainer, rollouts = ckpt_engine.form_local_group({"backend": "naive", "timeout_seconds": 20}, rollouts=2)
    destination = ckpt_engine.Destination({"a": torch.zeros(4)})
    first = in_thread(rollouts[0].receive_into, destination)
    with pytest.raises(TimeoutError):
        first.result(0.3)
    with pytest.raises(ckpt_engine.StateError, match="the destination is at work"):
        rollouts[1].receive_into(destination)
    other = in_thread(rollouts[1].receive_into, ckpt_engine.Destination({"a": torch.zeros(4)}))
    trainer.send_weights({"a": torch.ones(4)}, 1)
    assert first.result(10).version == other.result(10).version == 1
    for engine in (trainer, *rollouts):
        engine.finalize()


def test_a_cancelled_wait_leaves_engine_and_destination_free(local):
    trainer, rollout = local
    own = torch.zeros(4)
    destination = ckpt_engine.Destination({"a": own})

    async def run():
        waiting = asyncio.create_task(rollout.receive_into_async(destination))
        await asyncio.sleep(0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        receiving = asyncio.create_task(rollout.receive_into_async(destination))
        await trainer.send_weights_async({"a": torch.ones(4)}, 1)
        return await receiving

    assert asyncio.run(run()).version == 1
    assert own.tolist() == [1.0] * 4
