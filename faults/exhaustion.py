"""Memory, descriptors, shared memory and disks that run out."""

import os
import pathlib
import resource
import subprocess
import time

from lab import HANG, LEAK, OTHER, STUCK
from ranks import PATIENCE, Group, Trainer, last_of

FILES, ADDRESSES = resource.RLIMIT_NOFILE, resource.RLIMIT_AS


def run(lab, case):
    backend = case.random.choice(lab.backends())
    kind = KINDS[case.number % len(KINDS)]
    case.about(f'{kind.__doc__}, {backend}')
    case.faults += 1
    kind(lab, case, backend)


def few_descriptors(lab, case, backend):
    """few descriptors"""
    most = case.random.choice([64, 24, 12])
    case.about(f'{most}')
    until_its_end(lab, case, backend, trainer_limits=((FILES, most),), rollout_limits=((FILES, most),))


def little_memory_of_rollouts(lab, case, backend):
    """little memory on rollouts"""
    megabytes = case.random.choice([2000, 300, 120, 60])
    case.about(f'{megabytes} MB')
    until_its_end(lab, case, backend, rollout_limits=((ADDRESSES, megabytes << 20),))


def little_memory_of_the_trainer(lab, case, backend):
    """little memory on the trainer"""
    megabytes = case.random.choice([2000, 300, 120, 60])
    case.about(f'{megabytes} MB')
    until_its_end(lab, case, backend, trainer_limits=((ADDRESSES, megabytes << 20),))


def full_shared_memory(lab, case, backend):
    """/dev/shm full while updates run"""
    with Group(lab, case, backend, 2, interval=0.02) as group:
        group.comes_up()
        fill('/dev/shm/fill')
        try:
            if not group.trainer.next_update(PATIENCE, time.monotonic()):
                case.problem(STUCK, f'no update while /dev/shm is full: {group.describe()}')
        finally:
            os.unlink('/dev/shm/fill')
        if not group.is_whole(30, time.monotonic(), restart=True):
            case.problem(STUCK, f'not all are active after /dev/shm was full: {group.describe()}')


def full_shared_memory_at_the_start(lab, case, backend):
    """/dev/shm full before the start"""
    fill('/dev/shm/fill')
    try:
        until_its_end(lab, case, backend)
    finally:
        os.unlink('/dev/shm/fill')


def full_disk(lab, case, backend):
    """a disk that is full"""
    folder = lab.folder / 'disk'
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6M', 'tmpfs', folder], check=True)
    try:
        told = sync_with_folder(lab, case, backend, folder / 'out')
        if told and str(folder) not in told:
            case.problem(OTHER, f'a full disk, and the folder is not named: {told}')
        left = [path for path in folder.rglob('*') if path.is_file() and path.stat().st_size]
        if left:
            case.problem(LEAK, f'a full disk keeps {left[:3]}')
    finally:
        subprocess.run(['umount', folder], check=True)
        folder.rmdir()


def impossible_folder(lab, case, backend):
    """a folder that cannot be made"""
    told = sync_with_folder(lab, case, backend, pathlib.Path('/proc/nowhere'))
    if told and '/proc/nowhere' not in told:
        case.problem(OTHER, f'the folder is not named: {told}')


def full_output(lab, case, backend):
    """a standard output that is full"""
    with open('/dev/full', 'w') as full:
        arguments = ['sync', '--synthetic', 'tiny-moe', '--updates', 50, '--json', '--timeout', 5]
        process = Trainer(lab, 'sync', arguments, stdout=full)
        try:
            if not process.ends_within(40):
                case.problem(HANG, 'sync has not ended though nothing can be written')
            elif process.code != 1:
                case.problem(OTHER, f'sync ended with {process.code} though nothing could be written')
        finally:
            process.close()
    lab.look_for_leaks(case)


KINDS = (
    few_descriptors,
    little_memory_of_rollouts,
    full_shared_memory,
    impossible_folder,
    little_memory_of_the_trainer,
    full_disk,
    full_output,
    full_shared_memory_at_the_start,
)


def until_its_end(lab, case, backend, **limits):
    """Whatever lacks: all ranks end, none by a signal, and all that fail say why."""
    with Group(lab, case, backend, 2, updates=5, **limits) as group:
        for process in group.present():
            # It has to say that it cannot start, or that it has nobody to talk to.
            group.must_end(process, 2 * PATIENCE + 40, 'too little of something')


def sync_with_folder(lab, case, backend, folder):
    """What an update says that has to write where it cannot."""
    arguments = ['sync', '--synthetic', 'tiny-moe', '--rollouts', 1, '--updates', 1, '--timeout', 5, '--out', folder]
    arguments += ['--backend', backend.split('-')[0]]
    process = Trainer(lab, 'sync', arguments)
    try:
        if not process.ends_within(60):
            case.problem(HANG, f'sync has not ended: {last_of(process)}')
            return None
        if process.code != 1:
            case.problem(OTHER, f'sync ended with {process.code}: {last_of(process)}')
        errors = process.errors()
        return errors[0] if errors else 'nothing'
    finally:
        process.close()


def fill(path):
    with open(path, 'wb', buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
