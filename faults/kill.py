"""Processes that are killed at any moment, and started again."""

import os
import signal
import time

from lab import OTHER, STUCK
from ranks import DEADLINE, PATIENCE, SILENCE, Group, Trainer, is_placed, last_of, transport

# How many rollouts die in a group before its trainer does.
KILLS = 7


def run(lab, case):
    kind = case.random.choice(['running'] * 4 + ['starting', 'ending', 'sync', 'sync'])
    backend = case.random.choice(lab.backends(placed=True))
    case.about(f'{kind}, {backend}')
    {'running': running, 'starting': starting, 'ending': ending, 'sync': sync}[kind](lab, case, backend)


def running(lab, case, backend):
    """Rollouts are killed and started again under their numbers, at once or later; then the trainer is."""
    count = case.random.choice([2, 3, 3])
    interval, bucket = case.random.choice([0, 0, 0.02]), case.random.choice([1, 1, 4])
    with Group(lab, case, backend, count, interval=interval, bucket=bucket) as group:
        group.comes_up()
        for _ in range(KILLS):
            time.sleep(case.random.uniform(0, 0.4))
            if not kill_rollouts(case, group):
                return
        time.sleep(case.random.uniform(0, 0.3))
        group.trainer.kill()
        case.faults += 1
        for rollout in group.rollouts.values():
            group.must_end(rollout, PATIENCE, 'the trainer was killed', codes=(1,), names='rank 0')


def kill_rollouts(case, group):
    several = group.count > 2 and case.random.random() < 0.2
    victims = case.random.sample(sorted(group.rollouts), 2 if several else 1)
    at_once = case.random.random() < 0.5
    killed = time.monotonic()
    for rank in victims:
        group.rollouts[rank].kill()
        case.faults += 1
    if at_once:
        for rank in victims:
            group.start(rank)
    if not group.trainer.next_update(PATIENCE, killed + 0.05):
        case.problem(STUCK, f'no update after {victims} were killed: {group.describe()}')
        return False
    if not at_once:
        for rank in victims:
            group.start(rank)
    if not group.is_whole(30, time.monotonic()):
        case.problem(STUCK, f'{victims}, started again, are not active after 30 s: {group.describe()}')
        return False
    for line in group.trainer.errors(killed):
        # A death is the loss of that rank, whatever its connection said last.
        if 'the connection broke' in line and 'its process died' not in line:
            case.problem(OTHER, f'a killed rollout is told as a broken connection: {line}')
    for rollout in group.rollouts.values():
        if not rollout.is_alive():
            case.problem(STUCK, f'{rollout.name}, which lives, has ended: {last_of(rollout)}')
    return True


def starting(lab, case, backend):
    """A rank dies while the group forms; it is started again, or not."""
    with Group(lab, case, backend, 2, updates=2) as group:
        time.sleep(case.random.uniform(0, 0.3 if backend.startswith('ipc') else 1.5))
        rank = case.random.choice([0, 1, 2])
        victim = group.rollouts.get(rank, group.trainer)
        victim.kill()
        case.faults += 1
        victim.ends_within(5)
        if case.random.random() < 0.6:
            if rank:
                group.start(rank)
            else:
                group.past.append(group.trainer)
                group.start_trainer()
        for process in group.present():
            if process is not victim:
                group.must_end(process, 2 * DEADLINE + SILENCE + 8, f'rank {rank} was killed at the start')


def ending(lab, case, backend):
    """A rank ends by a signal while the group ends."""
    with Group(lab, case, backend, 2, updates=3) as group:
        if not group.trainer.next_update(40, 0.0, lambda update: update['version'] == 3):
            return case.problem(STUCK, f'three updates do not succeed: {group.describe()}')
        time.sleep(case.random.choice([0, 0, case.random.uniform(0, 0.15)]))
        number = case.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        victim = case.random.choice(group.present())
        victim.signal(number)
        case.faults += 1
        for process in group.present():
            codes = (0, 1, -number, 128 + number) if process is victim else (0, 1)
            group.must_end(process, PATIENCE, f'{victim.name} got {number.name} at the end', codes)


def sync(lab, case, backend):
    """The program that starts all ranks dies, or one of those that it has started."""
    arguments = ['sync', '--synthetic', 'tiny-moe', '--updates', 1_000_000, '--verify', '--json']
    arguments += [*transport(backend), '--timeout', DEADLINE, '--bucket-mb', 1]
    if is_placed(backend):
        arguments += ['--placed', '--trainer-layout', 'fsdp=2', '--rollout-layout', 'tp=2']
    else:
        arguments += ['--rollouts', 2]
    parent = Trainer(lab, 'sync', arguments)
    try:
        if case.random.random() < 0.3:
            time.sleep(case.random.uniform(0, 0.5))
        else:
            parent.next_update(40, 0.0)
            time.sleep(case.random.uniform(0, 0.4))
        children = [pid for pid in lab.marked() if pid != parent.pid]
        number = case.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        case.faults += 1
        of_child = children and case.random.random() < 0.5
        if of_child:
            parent.was_killed |= not send(case.random.choice(children), number)
        else:
            parent.signal(number)
        if not parent.ends_within(PATIENCE):
            case.problem('hangs', f'sync has not ended {PATIENCE} s after {number.name}: {last_of(parent)}')
        elif of_child and parent.code == 0 and number == signal.SIGKILL:
            case.problem(OTHER, 'sync ended with 0 though a rank of it was killed')
        elif of_child and parent.code == 1 and 'rank' not in ' '.join(line for _, line in parent.err):
            case.problem(OTHER, f'sync does not say which rank was killed: {last_of(parent)}')
        end = time.monotonic() + PATIENCE
        while lab.marked() and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        parent.close()
    lab.look_for_leaks(case)


def send(pid, number):
    """Signals a process of this run; whether it was there. Its number was read a moment ago, in namespaces of this run."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True
