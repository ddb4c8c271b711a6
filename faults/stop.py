"""Processes that stand still for a while: longer than anybody waits, or a little shorter, again and again."""

import signal
import time

from lab import HANG, OTHER, STUCK
from ranks import DEADLINE, PATIENCE, SILENCE, Group

# Below the deadline, and above what a transfer is given of it: the peer is given up, and answers afterwards.
ALMOST = 0.86 * DEADLINE


def run(lab, case):
    backend = case.random.choice(lab.backends())
    if backend == 'nixl-tcp' and case.random.random() < 0.5:
        return again_and_again(lab, case, backend)
    who = case.random.choice([0, 1, 2])
    seconds = case.random.choice([2, 7, 8, 13])
    case.about(f'{backend}, rank {who} for {seconds} s')
    with Group(lab, case, backend, 2, interval=case.random.choice([0, 0.05])) as group:
        group.comes_up()
        time.sleep(case.random.uniform(0.1, 0.6))
        process = group.rollouts.get(who, group.trainer)
        begun = time.monotonic()
        case.faults += 1
        process.signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.signal(signal.SIGCONT)
        over = time.monotonic()
        if who:
            rollout_went_on(case, group, who, seconds, begun, over)
        elif seconds > SILENCE + 1.5:
            for rollout in group.rollouts.values():
                group.must_end(rollout, DEADLINE, 'the trainer stood still', codes=(1,), names='rank 0')
            group.must_end(group.trainer, PATIENCE, 'it stood still, and all rollouts are gone', codes=(1,))
        elif not group.is_whole(30, over, restart=True):
            case.problem(STUCK, f'no whole update after the trainer stood still: {group.describe()}')


def rollout_went_on(case, group, rank, seconds, begun, over):
    errors = group.trainer.errors(begun)
    meanwhile = [at for at, _ in group.trainer.updates(begun) if at < over]
    if seconds > DEADLINE and not errors and not meanwhile:
        case.problem(HANG, f'nothing was said while rank {rank} stood still for {seconds} s')
    if errors and not any(f'rank {rank}' in line for line in errors):
        case.problem(OTHER, f'rank {rank} stood still, and the errors are {errors[:3]}')
    if any('has not called receive_weights' in line for line in errors):
        case.problem(OTHER, f'rank {rank} stood still and is told to be idle: {errors[0]}')
    if not group.trainer.next_update(PATIENCE, over):
        case.problem(STUCK, f'no update after rank {rank} stood still: {group.describe()}')
    elif not group.is_whole(30, time.monotonic(), restart=True):
        case.problem(STUCK, f'not all are active after rank {rank} stood still: {group.describe()}')


def again_and_again(lab, case, backend):
    case.about(f'{backend}, rank 1 for {ALMOST:.1f} s, again and again')
    with Group(lab, case, backend, 2, layers=1) as group:
        group.comes_up()
        for _ in range(4):
            time.sleep(case.random.uniform(0.05, 0.8))
            case.faults += 1
            group.rollouts[1].signal(signal.SIGSTOP)
            time.sleep(ALMOST)
            group.rollouts[1].signal(signal.SIGCONT)
            if not group.is_whole(30, time.monotonic()):
                return case.problem(STUCK, f'rank 1 stood still for a moment: {group.describe()}')
