"""Programs under test, and the groups that they form."""

import json
import os
import re
import resource
import signal
import subprocess
import threading
import time

from lab import HANG, OTHER, WRONG, NoGroup

# The deadline that groups are given, and the silence after which a rank counts as lost, in seconds.
DEADLINE, SILENCE = 5.0, 10.0
# The longest that a rank may say nothing, whatever happens to the others.
PATIENCE = DEADLINE + SILENCE + 5
# How long a rank may take to start and join, on a busy machine.
START = 40.0


def is_placed(backend):
    return backend.endswith('-placed')


def transport(backend):
    """The options that choose a transport."""
    name, *more = backend.split('-')
    return ['--backend', name, *(['--engine-kwarg', 'transports=tcp,self'] if 'tcp' in more else [])]


class Process:
    """A program, with all that it has said."""

    def __init__(self, lab, name, arguments, host=None, limits=(), environment=None, stdout=None):
        prefix = host.prefix() if host else []
        self.name = name
        self.arguments = [*prefix, lab.program, *map(str, arguments)]
        self.out, self.err = [], []
        self.changed = threading.Condition()
        self.was_killed = False
        self.began = time.monotonic()
        self.ended = None

        def limit():
            for what, most in limits:
                resource.setrlimit(what, (most, most))

        self.child = subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=stdout or subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=lab.environment() | (environment or {}),
            preexec_fn=limit if limits else None,
        )
        self.pid = self.child.pid
        # A number may be another process's by the time of a signal; a descriptor is this one's.
        self.descriptor = os.pidfd_open(self.pid)
        streams = [(self.child.stderr, self.err)]
        if stdout is None:
            streams.append((self.child.stdout, self.out))
        self.readers = [
            threading.Thread(target=self._read, args=stream, daemon=True) for stream in streams
        ]
        self.waiter = threading.Thread(target=self._wait, daemon=True)
        for thread in (*self.readers, self.waiter):
            thread.start()

    def _read(self, stream, lines):
        for line in stream:
            with self.changed:
                lines.append((time.monotonic(), line.decode('utf8', 'replace').rstrip('\n')))
                self.changed.notify_all()

    def _wait(self):
        self.child.wait()
        for reader in self.readers:
            reader.join(2)
        with self.changed:
            self.ended = time.monotonic()
            self.changed.notify_all()

    @property
    def code(self):
        return self.child.poll()

    def is_alive(self):
        return self.ended is None

    def signal(self, number):
        self.was_killed |= number == signal.SIGKILL
        try:
            signal.pidfd_send_signal(self.descriptor, number)
        except ProcessLookupError:
            pass

    def kill(self):
        self.signal(signal.SIGKILL)

    def until(self, holds, seconds):
        """Waits until something is true of what it has said; what that is, or `None` if it never is."""
        end = time.monotonic() + seconds
        with self.changed:
            while not (found := holds()):
                left = end - time.monotonic()
                if left <= 0:
                    return None
                self.changed.wait(min(left, 0.2))
            return found

    def ends_within(self, seconds):
        return self.until(lambda: self.ended is not None, seconds) is True

    def errors(self, since=0.0):
        """The errors that it has told, one line each, since a moment."""
        return [line for at, line in self.err if at >= since and line.startswith('error')]

    def close(self):
        if self.is_alive():
            self.signal(signal.SIGCONT)
            self.kill()
        self.waiter.join(10)
        os.close(self.descriptor)
        for stream in (self.child.stdout, self.child.stderr):
            if stream:
                stream.close()

    def usage(self):
        """Anonymous memory in kB, descriptors and threads; `None` if it has ended."""
        try:
            with open(f'/proc/{self.pid}/status') as file:
                status = file.read()
            number = lambda key: int(re.search(rf'{key}:\s+(\d+)', status).group(1))
            descriptors = len(os.listdir(f'/proc/{self.pid}/fd'))
            return {'anonymous kB': number('RssAnon'), 'descriptors': descriptors, 'threads': number('Threads')}
        except (OSError, AttributeError):
            return None


class Trainer(Process):
    def updates(self, since=0.0):
        """What it has reported of updates that succeeded, each with its moment."""
        lines = [(at, line) for at, line in list(self.out) if at >= since and line.startswith('{')]
        return [(at, json.loads(line)) for at, line in lines]

    def last(self):
        updates = self.updates()
        return updates[-1][1]['version'] if updates else 0

    def next_update(self, seconds, since, fits=lambda update: True):
        """The first update from a moment on that fits, with its moment; `None` if there is none or it has ended."""
        seen = 0

        def found():
            nonlocal seen
            while seen < len(self.out):
                at, line = self.out[seen]
                seen += 1
                if at >= since and line.startswith('{'):
                    update = json.loads(line)
                    if fits(update):
                        return at, update
            return 'ended' if self.ended is not None else None

        result = self.until(found, seconds)
        return None if result == 'ended' else result


class Rollout(Process):
    def versions(self):
        said = (re.match(r'version (\d+):', line) for _, line in list(self.out))
        return [int(match.group(1)) for match in said if match]


class Group:
    """A trainer and its rollouts. Leaving its `with` ends all of them, and judges what they have said."""

    def __init__(
        self,
        lab,
        case,
        backend,
        rollouts=2,
        updates=1_000_000,
        bucket=1,
        interval=0.0,
        verify=True,
        hosts=None,
        address=None,
        layers=None,
        extra=(),
        trainer_limits=(),
        rollout_limits=(),
        rollout_extra=(),
    ):
        lab.groups += 1
        self.lab, self.case, self.backend, self.count = lab, case, backend, rollouts
        self.hosts, self.verify = hosts, verify
        self.rollout_limits, self.rollout_extra = rollout_limits, rollout_extra
        # Of flips in memory that a rollout has verified already, and still reads.
        self.may_see_wrong_bytes = False
        self.socket = None
        if address is None:
            self.socket = f's{lab.groups}' if case.random.random() < 0.5 else None
            address = f'unix:{lab.folder}/{self.socket}' if self.socket else f'unix:@{lab.mark}-{lab.groups}'
        self.address = address
        self.common = [*transport(backend), '--timeout', DEADLINE, '--threads', 1]
        self.common += ['--rendezvous', address, '--token-file', lab.token, *extra]
        if bucket:
            self.common += ['--bucket-mb', bucket]
        model = ['--synthetic', 'tiny-moe'] + (['--layers', layers] if layers else [])
        if is_placed(backend):
            layout = case.random.choice([f'fsdp={rollouts}', f'ranks={rollouts}'])
            self.common += ['--placed', '--trainer-layout', 'ranks=1', '--rollout-layout', layout]
            # A rollout lends what it wants of the model before it knows the trainer.
            spec = {'model': {'Synthetic': {'name': 'tiny-moe', 'layers': layers}}, 'updates': updates}
            self.rollout_extra = [*rollout_extra, '--source-json', json.dumps(spec)]
        arguments = ['trainer', '--updates', updates, '--interval', interval, '--json']
        arguments += [] if is_placed(backend) else ['--rollouts', rollouts]
        self.trainer_arguments = [*arguments, *model, *self.common]
        self.past = []
        self.start_trainer(trainer_limits)
        self.rollouts = {}
        for rank in range(1, rollouts + 1):
            self.start(rank)

    def start_trainer(self, limits=()):
        host = self.hosts[0] if self.hosts else None
        self.trainer = Trainer(self.lab, 'trainer', self.trainer_arguments, host, limits)

    def start(self, rank):
        """Starts a rollout, or starts it again."""
        if rank in self.rollouts:
            self.past.append(self.rollouts[rank])
        arguments = ['rollout', '--rank', rank, *(['--verify'] if self.verify else []), *self.common]
        arguments += [str(word).replace('{rank}', str(rank)) for word in self.rollout_extra]
        host = self.hosts[rank] if self.hosts else None
        rollout = Rollout(self.lab, f'rollout {rank}', arguments, host, self.rollout_limits)
        self.rollouts[rank] = rollout
        return rollout

    def present(self):
        return [self.trainer, *self.rollouts.values()]

    def everyone(self):
        return self.present() + self.past

    def comes_up(self):
        """Waits for the first update."""
        if not self.trainer.next_update(START, 0.0):
            raise NoGroup(self.describe())

    def is_whole(self, seconds, since, restart=False):
        """Whether an update reaches all rollouts within some time; those that have ended may be started again."""
        end = time.monotonic() + seconds
        full = lambda update: sum(one['state'] == 'active' for one in update['rollouts']) == self.count
        while (left := end - time.monotonic()) > 0 and self.trainer.is_alive():
            if restart:
                for rank, rollout in list(self.rollouts.items()):
                    if not rollout.is_alive():
                        self.start(rank)
            found = self.trainer.next_update(min(left, 1.0), since, full)
            if found:
                return found
        return None

    def describe(self):
        last = lambda lines: [line[:300] for _, line in lines[-2:]]
        return '; '.join(f'{one.name} ({one.code}): {last(one.err)}' for one in self.present())

    def must_end(self, process, seconds, why, codes=(0, 1), names=None):
        """Reports a process that does not end in time, or ends otherwise than it should."""
        if not process.ends_within(seconds):
            self.case.problem(HANG, f'{why}: {process.name} has not ended after {seconds} s: {last_of(process)}')
            return
        if process.code not in codes:
            self.case.problem(OTHER, f'{why}: {process.name} ended with {process.code}: {last_of(process)}')
        if process.code == 1 and not process.errors():
            self.case.problem(OTHER, f'{why}: {process.name} ended without a word')
        if names and process.code == 1 and not any(names in line for line in process.errors()):
            self.case.problem(OTHER, f'{why}: {process.name} does not name {names}: {last_of(process)}')

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for process in self.everyone():
            process.close()
        if kind is None:
            self.judge()
        allowed = [self.socket] if self.socket and self.trainer.was_killed else []
        if not self.socket_is_gone():
            allowed = [self.socket]
        self.lab.look_for_leaks(self.case, allowed)

    def socket_is_gone(self):
        # The socket file of a trainer that was killed stays until the next leader replaces it.
        return not self.socket or not (self.lab.folder / self.socket).exists()

    def judge(self):
        """Whole versions alone, the same everywhere, in order; and nobody has crashed."""
        committed = {update['version']: update for _, update in self.trainer.updates()}
        last = max(committed, default=0)
        for version, update in committed.items():
            digests = {one['digest'] for one in update['rollouts'] if one['state'] == 'active'}
            # Rollouts that lend their tensors may have different parts of the model. Each compares its own with the source.
            if len(digests) > 1 and not is_placed(self.backend):
                self.case.problem(WRONG, f'version {version} is active with different digests: {digests}')
        for process in self.everyone():
            if isinstance(process, Rollout):
                versions = process.versions()
                if any(later <= earlier for earlier, later in zip(versions, versions[1:])):
                    self.case.problem(WRONG, f'{process.name} went back: {versions[-5:]}')
                # What was committed at the moment of a kill may not have been reported.
                unknown = [version for version in versions if version not in committed and version <= last]
                if unknown:
                    self.case.problem(WRONG, f'{process.name} offered versions that failed: {unknown[:5]}')
            for _, line in process.err:
                wrong = ('verifying a received weight', 'verifying what was written', 'verifying tensors')
                if any(words in line for words in wrong) and not self.may_see_wrong_bytes:
                    self.case.problem(WRONG, f'{process.name}: {line}')
                if 'panicked' in line:
                    self.case.problem(OTHER, f'{process.name}: {line}')
                if 'of the version before are still in use' in line:
                    self.case.problem(OTHER, f'{process.name}: the update after a failed one: {line}')
            if process.code is not None and process.code < 0 and not process.was_killed:
                if process.code not in (-signal.SIGTERM, -signal.SIGINT):
                    self.case.problem(OTHER, f'{process.name} ended by signal {-process.code}: {last_of(process)}')


def last_of(process):
    return ' | '.join(line[:300] for _, line in process.err[-3:])
