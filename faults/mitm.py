"""A man in the middle of the control plane, who changes what passes by after the handshake."""

import socket
import struct
import threading
import time

from lab import OTHER, STUCK
from ranks import PATIENCE, Group, last_of

# What may happen to one record.
CHANGES = ('flip', 'drop', 'double', 'swap', 'cut short', 'close')


def run(lab, case):
    change = case.random.choice(CHANGES)
    way = case.random.choice(['up', 'down'])
    # Behind the handshake; the first ones are those of joining.
    at = case.random.choice([3, 4, 5, case.random.randrange(3, 60)])
    backend = case.random.choice(lab.backends())
    case.about(f'{backend}, {change} of record {at}, {way}')
    port = case.random.randrange(20000, 40000)
    address = f'127.0.0.1:{port}'
    with Group(lab, case, backend, 2, address=address, interval=0.02) as group:
        group.comes_up()
        relay = Relay(port, change, way, at, case.random)
        try:
            meddle(case, group, relay)
        finally:
            relay.close()


def meddle(case, group, relay):
    """One of the rollouts is started again, by way of the relay."""
    group.rollouts[2].kill()
    group.rollouts[2].ends_within(5)
    own = group.address
    group.common[group.common.index(own)] = f'127.0.0.1:{relay.port}'
    rollout = group.start(2)
    group.common[group.common.index(f'127.0.0.1:{relay.port}')] = own
    begun = time.monotonic()
    rollout.until(lambda: relay.is_done or rollout.ended, 20)
    if not relay.is_done:
        case.about('nothing was changed')
        return
    case.faults += 1
    # What was changed is noticed by who opens it: the rank is lost, or it ends.
    noticed = lambda: rollout.ended or group.trainer.errors(begun) or rollout.errors()
    if not rollout.until(noticed, PATIENCE):
        case.problem(OTHER, f'nobody has noticed it: {group.describe()}')
    changed = time.monotonic()
    if not group.trainer.next_update(PATIENCE, changed):
        case.problem(STUCK, f'no update afterwards: {group.describe()}')
    if rollout.is_alive():
        rollout.kill()
        rollout.ends_within(5)
    elif rollout.code not in (0, 1):
        case.problem(OTHER, f'{rollout.name} ended with {rollout.code}: {last_of(rollout)}')
    group.start(2)
    if not group.is_whole(30, time.monotonic()):
        case.problem(STUCK, f'not all are active 30 s after a record was changed: {group.describe()}')


class Relay:
    """Passes on what two sides say, record by record: the first frame of each side has a length of four bytes, all that
    follows of two. One record of the first connection is changed."""

    def __init__(self, to, change, way, at, random):
        self.to, self.change, self.way, self.at, self.random = to, change, way, at, random
        self.is_done = False
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.listener.close()

    def _accept(self):
        while True:
            try:
                member, _ = self.listener.accept()
                leader = socket.create_connection(('127.0.0.1', self.to))
            except OSError:
                return
            for one, other, way in ((member, leader, 'up'), (leader, member, 'down')):
                threading.Thread(target=self._pass_on, args=(one, other, way), daemon=True).start()

    def _pass_on(self, one, other, way):
        buffer, number, kept = b'', 0, None
        try:
            while data := one.recv(65536):
                buffer += data
                while (length := whole(buffer, number)) is not None:
                    record, buffer = buffer[:length], buffer[length:]
                    number += 1
                    if kept:
                        other.sendall(record + kept)
                        kept, self.is_done = None, True
                        continue
                    if number == self.at and way == self.way and not self.is_done:
                        if self.change == 'swap':
                            kept = record
                            continue
                        record = self._changed(record)
                        self.is_done = True
                        if record is None:
                            break
                    other.sendall(record)
                else:
                    continue
                break
        except OSError:
            pass
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _changed(self, record):
        if self.change == 'flip':
            # Not of the length: that is a record which is waited for.
            at = self.random.randrange(2, len(record))
            return record[:at] + bytes([record[at] ^ 1 << self.random.randrange(8)]) + record[at + 1 :]
        return {'drop': b'', 'double': record * 2, 'cut short': record[:-1], 'close': None}[self.change]


def whole(buffer, number):
    """The bytes of the first record, if all of it is there."""
    size, form = (4, '>I') if number == 0 else (2, '>H')
    if len(buffer) < size:
        return None
    length = size + struct.unpack(form, buffer[:size])[0]
    return length if len(buffer) >= length else None
