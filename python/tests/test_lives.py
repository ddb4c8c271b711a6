"""Signals, forks, and the ends of interpreters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import ckpt_engine

WEIGHTS = {f"w.{i}": bytes(1 << 20) for i in range(4)}


def script(text: str) -> subprocess.Popen:
    """A program of its own, which may import what the tests do.

    Ctrl-C reaches it also where the tests run in the background of a shell, whose children ignore it.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ended(process: subprocess.Popen, within: float = 20) -> str:
    output, errors = process.communicate(timeout=within)
    assert process.returncode == 0, f"{process.returncode}\n{output}\n{errors}"
    return output


INTERRUPTED = """
    import os, signal, sys, threading, time
    import ckpt_engine

    trainer, (rollout,) = ckpt_engine.form_local_group({"timeout_seconds": 600})
    weights = {"a": bytes(8), "b": bytes(8)}

    def interrupt():
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    def beside(function):
        errors = []
        def run():
            try:
                function()
            except Exception as error:
                errors.append(error)
        thread = threading.Thread(target=run)
        thread.start()
        return thread, errors

    def interrupted(wait):
        threading.Thread(target=interrupt).start()
        start = time.monotonic()
        try:
            wait()
        except KeyboardInterrupt:
            assert time.monotonic() - start < 5, "it took too long"
            return
        sys.exit("it was not interrupted")

    # A rollout that waits for an update.
    interrupted(rollout.receive_weights)
    # A trainer that waits for a rollout, which hears of it.
    thread, errors = beside(lambda: (rollout.receive_weights(), time.sleep(4)))
    interrupted(lambda: trainer.send_weights(weights, 1))
    thread.join()
    # A trainer whose iterator works.
    def slow():
        yield "a", weights["a"]
        time.sleep(60)
    thread, errors = beside(lambda: rollout.receive_weights().finish())
    interrupted(lambda: trainer.send_weights(slow(), 2))
    thread.join(5)
    assert isinstance(errors[0], ckpt_engine.Error), errors
    # A rollout that waits for the next tensor.
    stop = threading.Event()
    def slower():
        yield "a", weights["a"]
        stop.wait(60)
        yield "b", weights["b"]
    thread, errors = beside(lambda: trainer.send_weights(slower(), 3))
    interrupted(lambda: rollout.receive_weights().finish())
    stop.set()
    thread.join(5)
    assert isinstance(errors[0], ckpt_engine.AbortedError), errors
    # The next update works.
    thread, errors = beside(lambda: trainer.send_weights(weights, 4))
    assert len(dict(rollout.receive_weights(copy=True))) == 2
    thread.join(5)
    assert not errors
    print("fine")
"""


def test_ctrl_c_ends_every_wait_at_once_and_the_next_update_works():
    assert ended(script(INTERRUPTED)) == "fine\n"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_ranks_are_spawned_or_forked_before_the_first_use(method):
    text = f"""
        import ranks

        if __name__ == "__main__":
            group = ranks.Group(rollouts=1, method={method!r})
            import torch
            for version in (1, 2):
                group.update({{"w": torch.ones(7)}}, version)
            group.end()
            print("fine")
    """
    pytest.importorskip("torch")
    assert ended(script(text), 40) == "fine\n"


def test_a_process_forked_after_the_first_use_is_told_why_it_cannot_and_the_parent_goes_on():
    text = """
        import gc, os, sys, threading
        import ckpt_engine

        trainer, (rollout,) = ckpt_engine.form_local_group()
        control = ckpt_engine.ControlPlane.lead("127.0.0.1:0", ckpt_engine.generate_token())
        pid = os.fork()
        if pid == 0:
            for use in (
                lambda: trainer.send_weights({"a": b"1"}, 1),
                lambda: ckpt_engine.form_local_group(),
                lambda: control.ranks,
            ):
                try:
                    use()
                except ckpt_engine.StateError as error:
                    assert "forked" in str(error) and "spawn" in str(error), error
                else:
                    os._exit(3)
            # Nothing of the parent's is dropped here, and nothing waits for its threads.
            del trainer, rollout, control
            gc.collect()
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        thread = threading.Thread(target=lambda: rollout.receive_weights().finish())
        thread.start()
        trainer.send_weights({"a": b"1"}, 1)
        thread.join()
        print("fine")
    """
    assert ended(script(text)) == "fine\n"


KILLED_WITH_A_CHILD = """
    import os, signal, sys, time
    import ckpt_engine

    address, token = sys.argv[1], bytes.fromhex(sys.argv[2])
    if address == "lead":
        control = ckpt_engine.ControlPlane.lead("127.0.0.1:0", token)
        print(control.address, flush=True)
    else:
        control = ckpt_engine.ControlPlane.join(address, token)
    engine = ckpt_engine.form_group(control, {"backend": "ipc"}, world_size=2)
    child = os.fork()
    if child == 0:
        time.sleep(120)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def rank_with_a_child():
    """Starts a rank that forks; gives its process."""
    started, children = [], []

    def start(*arguments):
        code = textwrap.dedent(KILLED_WITH_A_CHILD)
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    def kill(process):
        children.append(int(process.stdout.readline()))
        process.kill()
        process.wait()

    yield start, kill
    for process in started:
        process.kill()
        process.wait()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_a_rank_that_is_killed_is_lost_at_once_though_a_child_that_it_forked_lives(rank_with_a_child):
    start, kill = rank_with_a_child
    token = ckpt_engine.generate_token()
    # Heartbeats would take longer than the update's deadline.
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token, heartbeat_timeout=40) as control:
        rank = start(control.address, token.hex())
        with ckpt_engine.form_group(control, {"backend": "ipc", "timeout_seconds": 20}, world_size=2) as engine:
            kill(rank)
            with pytest.raises(ckpt_engine.PeerLost):
                engine.send_weights({"w": b"1"}, 1)


def test_a_leader_that_is_killed_leaves_its_port_to_its_successor_though_a_child_that_it_forked_lives(rank_with_a_child):
    start, kill = rank_with_a_child
    token = ckpt_engine.generate_token()
    leader = start("lead", token.hex())
    address = leader.stdout.readline().strip()
    with ckpt_engine.ControlPlane.join(address, token, heartbeat_timeout=40) as control:
        with ckpt_engine.form_group(control, {"backend": "ipc", "timeout_seconds": 20}) as engine:
            kill(leader)
            with pytest.raises(ckpt_engine.PeerLost):
                engine.receive_weights().finish()
    with ckpt_engine.ControlPlane.lead(address, token):
        pass


def test_an_interpreter_that_ends_within_an_update_aborts_it_and_its_peer_hears_of_it(trainer):
    token = ckpt_engine.generate_token()
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as control:
        text = f"""
            import sys, threading, time
            import ckpt_engine

            control = ckpt_engine.ControlPlane.join({control.address!r}, {token!r})
            config = {{"backend": "ipc", "timeout_seconds": 30}}
            engine = ckpt_engine.form_group(control, config, world_size=2)
            def receive():
                weights = engine.receive_weights()
                next(weights)
                print("taken", flush=True)
                for _ in weights:
                    time.sleep(60)
            threading.Thread(target=receive, daemon=True).start()
            sys.stdin.readline() if False else time.sleep(3)
        """
        process = script(text)
        config = {"backend": "ipc", "timeout_seconds": 30}
        engine = ckpt_engine.form_group(control, config, world_size=2)
        start = time.monotonic()
        with pytest.raises(ckpt_engine.Error) as raised:
            engine.send_weights(WEIGHTS, 1)
        assert raised.value.rank == 1
        assert time.monotonic() - start < 15, "it was told, and did not wait for the deadline"
        assert ended(process) == "taken\n"
        engine.finalize()


def test_an_interpreter_ends_also_while_a_trainer_waits_on_a_daemon_thread():
    text = """
        import threading, time
        import ckpt_engine

        trainer, (rollout,) = ckpt_engine.form_local_group({"timeout_seconds": 600})
        ckpt_engine.enable_logging("debug")
        threading.Thread(target=trainer.send_weights, args=({"a": b"1"}, 1), daemon=True).start()
        threading.Thread(target=rollout.receive_weights, daemon=True).start()
        time.sleep(0.3)
        print("over", flush=True)
    """
    assert ended(script(text)) == "over\n"


def test_a_rollout_killed_by_a_signal_leaves_nothing_in_shared_memory(group):
    torch = pytest.importorskip("torch")
    before = set(os.listdir("/dev/shm"))
    made = group()
    made.update({"w": torch.ones(1000)}, 1)
    os.kill(made.rollouts[0].process.pid, signal.SIGKILL)
    made.rollouts[0].process.join()
    with pytest.raises(ckpt_engine.PeerLost):
        made.engine.send_weights({"w": torch.ones(1000)}, 2)
    made.end()
    left = {name for name in set(os.listdir("/dev/shm")) - before if "ckpt" in name}
    assert not left
