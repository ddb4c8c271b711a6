"""Engines within one process: phases, errors, event loops, configurations."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time

import pytest

import ckpt_engine

from ranks import in_thread

WEIGHTS = {"a": b"12345678", "b": bytes(1000)}


def update(trainer, rollout, version):
    receiving = in_thread(lambda: dict(rollout.receive_weights(version, copy=True)))
    report = trainer.send_weights(WEIGHTS, version)
    assert list(receiving.result(10)) == list(WEIGHTS)
    return report


def test_a_version_is_complete_only_when_all_of_it_was_taken(local):
    trainer, rollout = local
    sending = in_thread(trainer.send_weights, WEIGHTS, 1)
    received = rollout.receive_weights()
    assert received.version == 1
    assert next(received)[0] == "a"
    assert next(received)[0] == "b"
    with pytest.raises(TimeoutError):
        sending.result(0.5)
    assert (received.report, rollout.version) == (None, None)
    assert list(received) == []
    assert received.report.state == "active"
    assert sending.result(10).receivers[0].state == "active"
    assert rollout.version == 1


def test_only_what_changed_travels_and_the_report_says_how_much_that_was():
    trainer, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "delta": True})
    weights = {name: bytearray(value) for name, value in WEIGHTS.items()}
    for version in (1, 2):
        receiving = in_thread(lambda: dict(rollout.receive_weights(copy=True)))
        report = trainer.send_weights(weights, version)
        received = {name: tensor.tobytes() for name, tensor in receiving.result(10).items()}
        assert received == {name: bytes(value) for name, value in weights.items()}
        weights["b"][7] ^= 1
        if version == 1:
            assert report.delta.whole == "nothing was sent before"
            assert "checkpoint_engine/changed_ratio" not in report.metrics()
    assert (report.delta.whole, report.delta.changed_weights) == (None, 1)
    assert report.delta.elements == {"U8": ckpt_engine.ChangedElements(compared=1008, changed=1)}
    assert report.metrics()["checkpoint_engine/changed_ratio"] == 1 / 1008
    assert report.delta.shadow_bytes == 1008 and report.counts.wire_bytes < 200


def test_a_version_is_attested_on_demand_where_ranks_keep_copies(local):
    trainer, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "delta": True})
    with pytest.raises(ckpt_engine.StateError, match="nothing was sent before"):
        trainer.attest()
    update(trainer, rollout, 1)
    receiving = in_thread(lambda: dict(rollout.receive_weights(copy=True)))
    report = trainer.attest()
    received = {name: tensor.tobytes() for name, tensor in receiving.result(10).items()}
    assert received == {name: bytes(value) for name, value in WEIGHTS.items()}
    assert (report.version, report.delta.attested, rollout.version) == (1, True, 1)
    with pytest.raises(ckpt_engine.ConfigError, match="delta: true"):
        local[0].attest()


def test_a_part_of_a_version_is_sent_and_all_other_weights_are_those_of_the_version_before(local):
    parts = {"adapter": ["*.lora_*"]}
    trainer, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "delta": True, "parts": parts})
    digests = []
    adapter = {f"base_model.model.q_proj.lora_{side}.weight": bytearray(64) for side in "AB"}
    with pytest.raises(ckpt_engine.StateError, match="nothing was sent before"):
        trainer.send_weights(adapter, 1, part=True)
    whole = {**WEIGHTS, **adapter}
    for version in (1, 2, 3):
        adapter["base_model.model.q_proj.lora_B.weight"][0] = version
        receiving = in_thread(lambda: dict(rollout.receive_weights(copy=True)))
        if version == 1:
            report = trainer.send_weights(whole, version)
        else:
            report = trainer.send_weights(adapter, version, part=True)
        received = {name: tensor.tobytes() for name, tensor in receiving.result(10).items()}
        assert received == {name: bytes(value) for name, value in whole.items()}
        assert (report.version, rollout.version) == (version, version)
        digests.append({name: part.digest for name, part in report.delta.parts.items()})
    assert report.delta.changed_weights == 1
    assert {name: (part.tensors, part.sent) for name, part in report.delta.parts.items()} == {
        "adapter": (2, 1),
        "policy": (len(WEIGHTS), 0),
    }
    assert len({digest["policy"] for digest in digests}) == 1
    assert len({digest["adapter"] for digest in digests}) == 3
    with pytest.raises(ckpt_engine.ConfigError, match="delta: true"):
        local[0].send_weights(adapter, 1, part=True)


def test_a_rollout_gets_the_parts_that_it_wants_and_reports_say_so():
    config = {"backend": "naive", "parts": {"adapter": ["*.lora_*"]}}
    trainer, (rollout,) = ckpt_engine.form_local_group({**config, "wants": ["adapter"]})
    adapter = {f"base_model.model.q_proj.lora_{side}.weight": bytearray(64) for side in "AB"}
    receiving = in_thread(lambda: dict(rollout.receive_weights(copy=True)))
    report = trainer.send_weights({**WEIGHTS, **adapter}, 1)
    received = {name: tensor.tobytes() for name, tensor in receiving.result(10).items()}
    assert received == {name: bytes(value) for name, value in adapter.items()}
    assert report.receivers[0].parts == ("adapter",)
    assert report.counts.tensors == 2
    with pytest.raises(ckpt_engine.ConfigError, match="wants"):
        ckpt_engine.form_local_group({**config, "wants": []})


def test_the_version_before_stays_when_the_next_one_is_left(local):
    trainer, rollout = local
    update(trainer, rollout, 1)
    sending = in_thread(trainer.send_weights, WEIGHTS, 2)
    with pytest.raises(ckpt_engine.AbortedError, match="before its end"):
        with rollout.receive_weights() as received:
            next(received)
    with pytest.raises(ckpt_engine.AbortedError, match="before its end"):
        sending.result(10)
    # It gives its error whenever it is asked, and never says that it is complete.
    for _ in range(2):
        with pytest.raises(ckpt_engine.AbortedError):
            next(received)
    assert rollout.version == 1
    update(trainer, rollout, 3)
    assert rollout.version == 3


def test_an_update_that_nobody_reads_ends_when_it_is_dropped(local):
    trainer, rollout = local
    sending = in_thread(trainer.send_weights, WEIGHTS, 1)
    received = rollout.receive_weights()
    del received
    with pytest.raises(ckpt_engine.AbortedError):
        sending.result(10)
    update(trainer, rollout, 2)


def test_an_update_that_was_left_without_a_word_ends_when_the_next_one_is_waited_for(local):
    trainer, rollout = local
    sending = in_thread(trainer.send_weights, WEIGHTS, 1)
    left = rollout.receive_weights()
    next(left)
    receiving = in_thread(lambda: dict(rollout.receive_weights(2, copy=True)))
    with pytest.raises(ckpt_engine.AbortedError, match="another update"):
        sending.result(10)
    trainer.send_weights(WEIGHTS, 2)
    assert list(receiving.result(10)) == list(WEIGHTS)


def test_both_ends_run_on_one_event_loop(local):
    trainer, rollout = local

    async def receive():
        received = await rollout.receive_weights_async(copy=True)
        return [name async for name, _ in received]

    async def run(version):
        report, names = await asyncio.gather(trainer.send_weights_async(WEIGHTS, version), receive())
        return report.version, names

    for version in (1, 2):
        assert asyncio.run(run(version)) == (version, list(WEIGHTS))


def test_a_trainer_on_an_event_loop_waits_for_the_end_of_its_update_however_slow_the_rollout():
    config = {"backend": "naive", "update_weights_bucket_megabytes": 1}
    trainer, (rollout,) = ckpt_engine.form_local_group(config)
    # As many as may wait for the engine when the iterator has ended, in many buckets.
    weights = {f"w.{i}": bytes(64 << 10) for i in range(250)}

    def receive():
        names = []
        for name, _ in rollout.receive_weights():
            names.append(name)
            time.sleep(0.002)
        return names

    receiving = in_thread(receive)
    assert asyncio.run(trainer.send_weights_async(weights, 1)).version == 1
    assert receiving.result(10) == list(weights)


def test_a_cancelled_task_aborts_its_update_and_the_next_one_works(local):
    trainer, rollout = local

    async def never():
        yield "a", WEIGHTS["a"]
        await asyncio.sleep(3600)

    async def run():
        sending = asyncio.create_task(trainer.send_weights_async(never(), 1))
        received = await rollout.receive_weights_async()
        await asyncio.sleep(0.1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(ckpt_engine.Error):
            await received.finish_async()
        waiting = asyncio.create_task(rollout.receive_weights_async())
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
    update(trainer, rollout, 2)


def test_a_call_that_waits_is_woken_and_does_not_wait_for_the_next_look_at_signals(local, monkeypatch):
    trainer, rollout = local
    monkeypatch.setattr("ckpt_engine._waiting.TICK", 15.0)
    # More than wait for the engine at a time, by their number and by their size.
    for version, (count, size) in enumerate([(2000, 8), (40, 8 << 20)], 1):
        weights = {f"w.{i}": bytes(size) for i in range(count)}
        start = time.monotonic()
        receiving = in_thread(lambda: rollout.receive_weights(version, partial=True).finish())
        trainer.send_weights(weights, version)
        receiving.result(10)
        assert time.monotonic() - start < 10


def test_two_updates_at_once_on_one_engine_are_refused(local):
    trainer, rollout = local
    sending = in_thread(trainer.send_weights, WEIGHTS, 1)
    received = rollout.receive_weights()
    with pytest.raises(ckpt_engine.StateError, match="at work"):
        trainer.send_weights(WEIGHTS, 2)
    received.finish()
    assert sending.result(10).version == 1


def test_a_finalized_engine_says_so():
    trainer, (rollout,) = ckpt_engine.form_local_group()
    trainer.finalize()
    with pytest.raises(ckpt_engine.StateError, match="finalized"):
        trainer.send_weights(WEIGHTS, 1)
    rollout.finalize()
    rollout.finalize()


def test_an_asynchronous_iterable_needs_the_asynchronous_call(local):
    async def weights():
        yield "a", b""

    with pytest.raises(TypeError, match="send_weights_async"):
        local[0].send_weights(weights(), 1)


def test_configurations_are_mappings_or_files_and_unknown_keys_are_errors(tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text("checkpoint_engine:\n  backend: ipc\n  timeout_seconds: 5\n")
    ckpt_engine.check_config(path)
    ckpt_engine.check_config({"backend": "ipc"})
    with pytest.raises(ckpt_engine.ConfigError, match="bakend.*known keys"):
        ckpt_engine.check_config({"bakend": "ipc"})
    with pytest.raises(ckpt_engine.BackendError, match="known: naive"):
        ckpt_engine.form_local_group({"backend": "pigeons"})
    with pytest.raises(ValueError):
        ckpt_engine.check_config({"timeout_seconds": -1})


def test_a_group_whose_ranks_are_missing_times_out_and_names_them(trainer):
    with pytest.raises(ckpt_engine.TimeoutError, match="1"):
        ckpt_engine.form_group(trainer, {"backend": "ipc"}, world_size=2, timeout=0.3)


def test_who_does_not_know_the_token_is_refused(trainer):
    with pytest.raises(ckpt_engine.AuthenticationError):
        ckpt_engine.ControlPlane.join(trainer.address, b"another secret of no use", connect_timeout=2)


def test_ranks_say_things_to_each_other(trainer):
    token = ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as control:
        with ckpt_engine.ControlPlane.join(control.address, token) as other:
            config = {"backend": "ipc"}
            forming = in_thread(
                ckpt_engine.form_group, other, config, world_size=2, attributes={"gpu": 3}
            )
            engine = ckpt_engine.form_group(control, config, world_size=2)
            rollout = forming.result(10)
            assert [(peer.rank, peer.role) for peer in engine.peers] == [(0, "trainer"), (1, "rollout")]
            assert engine.peers[1].attributes == {"gpu": 3}
            here, there = control.channel(2), other.channel(2)
            there.send(0, b"a reward")
            assert here.recv(10) == (1, b"a reward")
            assert here.recv(0.05) is None
            with pytest.raises(ckpt_engine.Error):
                there.send(1, b"to itself")
            rollout.finalize()
            engine.finalize()


def test_exceptions_travel_between_processes():
    error = ckpt_engine.PeerLost("it died", rank=3, bucket=7, version=9, recovery="Retry", text="all of it")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is ckpt_engine.PeerLost
    assert (back.rank, back.bucket, back.version, back.recovery) == (3, 7, 9, "Retry")
    assert str(back) == "all of it"
    assert isinstance(back, ConnectionError)


def test_reports_are_data(local):
    report = update(*local, 5)
    assert report.counts.wire_bytes == sum(map(len, WEIGHTS.values()))
    assert report.elapsed > 0 and report.stages.source >= 0
    assert report.metrics()["checkpoint_engine/version"] == 5
    with pytest.raises(AttributeError):
        report.version = 6


def test_what_the_engine_logs_reaches_logging(caplog, trainer):
    ckpt_engine.enable_logging("debug")
    assert not ckpt_engine.enable_logging(logging.DEBUG), "once in a process"
    with pytest.raises(ValueError, match="loud"):
        ckpt_engine.enable_logging("loud")
    with caplog.at_level(logging.DEBUG, "ckpt_engine"):
        with pytest.raises(ckpt_engine.AuthenticationError):
            secret = b"another secret of no use"
            ckpt_engine.ControlPlane.join(trainer.address, secret, connect_timeout=2)
        end = time.monotonic() + 5
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.05)
    assert caplog.records
    assert all(record.name.startswith("ckpt_engine.") for record in caplog.records)
