"""Hosts that are network namespaces, and a switch between them that delays, drops, doubles, reorders and cuts.

The switch is this program: each host has a TUN device whose other end is read and written here. It needs no module of the
kernel beyond that one."""

import dataclasses
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time

from lab import CannotRun, run

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
NETWORK = '10.77.0'


@dataclasses.dataclass
class Weather:
    """What happens to packets. Times in seconds, the rest probabilities."""

    cut: frozenset = frozenset()  # pairs (from, to) of hosts
    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    double: float = 0.0
    reorder: float = 0.0


def both(one, other):
    return frozenset({(one, other), (other, one)})


class Host:
    def __init__(self, number):
        self.number = number
        self.keeper = subprocess.Popen(
            # It ends with this program, which has the other end of its input.
            ['unshare', '--net', '--mount', 'sh', '-c', 'mount -t sysfs sysfs /sys && echo && exec cat'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not self.keeper.stdout.readline():
            raise CannotRun('a network namespace cannot be made: it needs root')
        try:
            self.tun = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
            name = f'f{os.getpid() % 100000}h{number}'
            fcntl.ioctl(self.tun, TUNSETIFF, struct.pack('16sH22x', name.encode(), IFF_TUN | IFF_NO_PI))
        except OSError as error:
            raise CannotRun(f'/dev/net/tun: {error}') from error
        run(['ip', 'link', 'set', name, 'netns', str(self.keeper.pid)])
        for words in (
            ['link', 'set', 'lo', 'up'],
            ['link', 'set', name, 'mtu', '1500', 'txqueuelen', '5000', 'up'],
            ['addr', 'add', f'{self.address()}/24', 'dev', name],
        ):
            run([*self.prefix(), 'ip', *words])

    def address(self):
        return f'{NETWORK}.{self.number + 1}'

    def prefix(self):
        """What runs a command on this host."""
        return ['nsenter', '--target', str(self.keeper.pid), '--net', '--mount', '--']

    def close(self):
        self.keeper.kill()
        self.keeper.wait()
        self.keeper.stdin.close()
        self.keeper.stdout.close()
        os.close(self.tun)


class Switch:
    """Hosts, joined. The weather may change at any time."""

    def __init__(self, count, seed):
        self.weather = Weather()
        # Cuts the path between two hosts after so many large packets from the one to the other.
        self.armed = None
        self.cut_at = None
        self.random = random.Random(seed)
        self.hosts = []
        self.is_open = True
        try:
            for number in range(count):
                self.hosts.append(Host(number))
        except CannotRun:
            self.close()
            raise
        self.thread = threading.Thread(target=self._forward, daemon=True)
        self.thread.start()

    def arm(self, sender, receiver, packets):
        self.armed = [sender, receiver, packets]

    def _forward(self):
        waiting, count = [], 0
        numbers = {host.tun: host.number for host in self.hosts}
        while self.is_open:
            pause = max(0.0, min(0.2, waiting[0][0] - time.monotonic())) if waiting else 0.2
            for tun in select.select(list(numbers), [], [], pause)[0]:
                for packet in read_all(tun):
                    sender, receiver = numbers[tun], packet[19] - 1
                    if packet[0] >> 4 != 4 or not 0 <= receiver < len(self.hosts):
                        continue
                    for moment in self._moments(sender, receiver, packet):
                        count += 1
                        heapq.heappush(waiting, (moment, count, receiver, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, receiver, packet = heapq.heappop(waiting)
                try:
                    os.write(self.hosts[receiver].tun, packet)
                except OSError:
                    pass  # Its queue is full: a packet is lost, as on any network.

    def _moments(self, sender, receiver, packet):
        """When copies of a packet arrive; never, if it is lost."""
        weather = self.weather
        if self.armed and self.armed[:2] == [sender, receiver] and len(packet) > 1000:
            self.armed[2] -= 1
            if self.armed[2] <= 0:
                self.armed, self.cut_at = None, time.monotonic()
                weather = self.weather = dataclasses.replace(weather, cut=both(sender, receiver))
        chance = lambda probability: probability and self.random.random() < probability
        if (sender, receiver) in weather.cut or chance(weather.loss):
            return []
        moment = time.monotonic() + weather.delay + self.random.random() * weather.jitter
        if chance(weather.reorder):
            moment += 0.03
        return [moment] * (2 if chance(weather.double) else 1)

    def close(self):
        self.is_open = False
        if hasattr(self, 'thread'):
            self.thread.join(2)
        for host in self.hosts:
            host.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_all(tun):
    for _ in range(64):
        try:
            packet = os.read(tun, 65536)
        except OSError:
            return
        if len(packet) >= 20:
            yield packet
