"""The place that faults happen in: namespaces of its own, and what is found there."""

import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

INSIDE = 'CKPT_ENGINE_FAULTS_INSIDE'
MARK = 'CKPT_ENGINE_FAULTS_MARK'
BACKENDS = ('ipc', 'nixl', 'nixl-tcp')
# Trainers write into tensors that rollouts lend.
PLACED = ('ipc-placed', 'nixl-placed', 'nixl-tcp-placed')

# What a case can find. Each is a column of the table.
HANG, LEAK, WRONG, STUCK, OTHER = 'hangs', 'leaks', 'wrong bytes', 'not recovered', 'other'
KINDS = (HANG, LEAK, WRONG, STUCK, OTHER)


class CannotRun(Exception):
    """This machine lacks what a class needs."""


class NoGroup(Exception):
    """A group did not form, before any fault: the machine is too busy, or the program is broken."""


@dataclasses.dataclass
class Case:
    """One case of a class: everything about it follows from its seed, but for the timing."""

    cls: str
    number: int
    seed: int
    random: random.Random
    what: list = dataclasses.field(default_factory=list)
    faults: int = 0
    problems: list = dataclasses.field(default_factory=list)
    has_group: bool = True
    seconds: float = 0.0

    def is_late(self):
        """Whether it has failed, and by nothing but time."""
        kinds = {kind for kind, _ in self.problems}
        return bool(kinds) and not kinds & {WRONG, LEAK}

    def about(self, text):
        self.what.append(text)

    def problem(self, kind, text):
        self.problems.append((kind, text))


class Lab:
    """What the cases of a run share."""

    def __init__(self, options):
        self.program = os.path.abspath(options.program)
        self.nixl = os.environ.get('CKPT_ENGINE_NIXL_DIR')
        self.backend = options.backend
        self.seed = options.seed
        self.verbose = options.verbose
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix='ckpt-faults-'))
        self.mark = f'{os.getpid()}-{self.folder.name}'
        self.token = self.folder / 'token'
        self.token.write_text(os.urandom(32).hex())
        self.token.chmod(0o600)
        self.groups = 0

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def case(self, cls, number):
        return Case(cls, number, self.seed, random.Random(f'{self.seed}/{cls}/{number}'))

    def backends(self, placed=False):
        """The transports that run here and were asked for; those with placed updates are asked for by name, or by the class."""
        some = [self.backend] if self.backend else [*BACKENDS, *(PLACED if placed else ())]
        usable = [one for one in some if one.startswith('ipc') or self.nixl]
        if not usable:
            raise CannotRun('NIXL is not installed: cargo xtask setup')
        return usable

    def environment(self):
        """What every program is started with; those that outlive their case are found by the mark."""
        return dict(os.environ, TMPDIR=str(self.folder), RUST_BACKTRACE='0', **{MARK: self.mark})

    def marked(self):
        """The processes of this run that have not ended."""
        found = []
        for entry in os.listdir('/proc'):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                with open(f'/proc/{entry}/environ', 'rb') as file:
                    is_marked = f'{MARK}={self.mark}'.encode() in file.read().split(b'\0')
                with open(f'/proc/{entry}/stat') as file:
                    state = file.read().rsplit(')', 1)[1].split()[0]
            except OSError:
                continue
            if is_marked and state != 'Z':
                found.append(int(entry))
        return found

    def look_for_leaks(self, case, allowed=()):
        """Reports processes, shared memory and files that a case has left, and removes them."""
        end = time.monotonic() + 5
        while self.marked() and time.monotonic() < end:
            time.sleep(0.02)
        for pid in self.marked():
            case.problem(LEAK, f'process {pid} is still there: {command_line(pid)}')
            os.kill(pid, 9)
        for folder, known in (('/dev/shm', {'fill'}), (self.folder, {'token', *allowed})):
            for name in set(os.listdir(folder)) - known:
                case.problem(LEAK, f'{folder}/{name} was left')
                path = os.path.join(folder, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        for name in allowed:
            (self.folder / name).unlink(missing_ok=True)


def command_line(pid):
    try:
        with open(f'/proc/{pid}/cmdline') as file:
            return file.read().replace('\0', ' ')[:200]
    except OSError:
        return 'it has just ended'


def namespaces():
    """What starts a program in namespaces of its own: all that it has started end with it, and it sees nobody else."""
    user = [] if os.geteuid() == 0 else ['--user', '--map-root-user']
    return ['unshare', *user, '--mount', '--ipc', '--net', '--pid', '--fork', '--kill-child', '--mount-proc']


def can_enter():
    """Whether namespaces can be made here; if not, why."""
    try:
        done = subprocess.run([*namespaces(), 'ip', 'link', 'set', 'lo', 'up'], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()


def enter():
    """Goes on in them, with an empty /dev/shm."""
    if os.environ.get(INSIDE) != '1':
        os.environ[INSIDE] = '1'
        os.execvp('unshare', [*namespaces(), sys.executable, *sys.argv])
    run(['mount', '-t', 'tmpfs', '-o', 'size=256M', 'tmpfs', '/dev/shm'])
    run(['ip', 'link', 'set', 'lo', 'up'])


def run(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotRun(f'{command[0]}: {error}') from error
    if done.returncode != 0:
        raise CannotRun(f'{" ".join(command)}: {done.stderr.strip()}')
