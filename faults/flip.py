"""Bits that change in the memory of buckets."""

import os
import re
import signal
import time

from lab import HANG, OTHER, WRONG, CannotRun
from ranks import Group

FLIPS = 12
# How far a clean run goes, whose digests tell what is right.
UPDATES = 400

_clean = {}


def run(lab, case):
    usable = [backend for backend in lab.backends() if backend in ('ipc', 'nixl')]
    if not usable:
        raise CannotRun('bits are flipped in the memory of ipc and nixl')
    backend = case.random.choice(usable)
    megabytes = 1 if backend == 'ipc' else 3
    verify = case.random.random() < 0.5
    right = clean(lab, case, backend, megabytes)
    seen = {'not to be told from other memory': 0, 'digest': 0, 'after verification': 0, 'no effect': 0}
    with Group(lab, case, backend, 2, updates=UPDATES, bucket=megabytes, interval=0.02, verify=verify) as group:
        # Memory that a rollout has verified already, and still reads, is its user's.
        group.may_see_wrong_bytes = True
        group.comes_up()
        for _ in range(FLIPS):
            if not group.trainer.is_alive() or group.trainer.last() > UPDATES - 40:
                break
            time.sleep(case.random.uniform(0.005, 0.05))
            flip(case, group, backend, 2 * megabytes << 20, seen)
        compare(case, group, right)
    case.about(f'{backend}, ' + ', '.join(f'{count} {what}' for what, count in seen.items() if count))


def clean(lab, case, backend, megabytes):
    """The digests of a run without faults, by version."""
    if backend not in _clean:
        with Group(lab, case, backend, 2, updates=UPDATES, bucket=megabytes, verify=False) as group:
            group.must_end(group.trainer, 180, 'a run without faults', codes=(0,))
        _clean[backend] = {update['version']: update['rollouts'][0]['digest'] for _, update in group.trainer.updates()}
    return _clean[backend]


def flip(case, group, backend, size, seen):
    target = group.trainer
    if backend != 'ipc' and case.random.random() < 0.6:
        target = group.rollouts[case.random.choice([1, 2])]
    base = buckets_of(target.pid, backend, size)
    if base is None:
        seen['not to be told from other memory'] += 1
        return
    everyone = group.present()
    before = {process: len(process.err) for process in everyone}
    heard = lambda: len(group.trainer.out) + len(group.trainer.err)
    # Nobody reads or writes at the moment of the flip.
    for process in everyone:
        process.signal(signal.SIGSTOP)
    told = heard()
    try:
        change_a_bit(case, target, base, size)
    finally:
        for process in everyone:
            process.signal(signal.SIGCONT)
    case.faults += 1
    if not group.trainer.until(lambda: heard() >= told + 3 or group.trainer.ended, 15):
        case.problem(HANG, f'nothing was said for 15 s after a flip: {group.describe()}')
    errors = {process: [line for _, line in process.err[before[process] :]] for process in everyone}
    lines = [line for some in errors.values() for line in some]
    digest = [line for line in lines if 'digest' in line.lower()]
    if digest:
        seen['digest'] += 1
        for line in errors[group.trainer]:
            if 'digest' in line.lower() and line.startswith('error') and not ('rank' in line and 'bucket' in line):
                case.problem(OTHER, f'a digest error without rank and bucket: {line}')
    elif any('verifying a received weight' in line for line in lines):
        seen['after verification'] += 1
    else:
        seen['no effect'] += 1


def change_a_bit(case, process, base, size):
    # The file of ipc's segment is sealed against writing; what is mapped of it is not.
    at = base + case.random.randrange(size)
    descriptor = os.open(f'/proc/{process.pid}/mem', os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, at)[0]
        os.pwrite(descriptor, bytes([byte ^ 1 << case.random.randrange(8)]), at)
    finally:
        os.close(descriptor)


def buckets_of(pid, backend, size):
    """Where a process has its buckets: the segment of ipc, or the one mapping that is as large as the slots of nixl; `None`
    if the kernel has joined that with what is beside it, which may be anything."""
    with open(f'/proc/{pid}/maps') as file:
        for line in file:
            first, last, access = re.match(r'([0-9a-f]+)-([0-9a-f]+) (\S+)', line).groups()
            length = int(last, 16) - int(first, 16)
            fits = 'ckpt-engine-' in line if backend == 'ipc' else length == size
            if fits and length >= size and access.startswith('rw'):
                return int(first, 16)
    return None


def compare(case, group, right):
    for _, update in group.trainer.updates():
        version = update['version']
        for one in update['rollouts']:
            if one['state'] == 'active' and version in right and one['digest'] != right[version]:
                case.problem(WRONG, f'version {version} was committed with {one["digest"]}, not {right[version]}')
