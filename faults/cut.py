"""Paths between hosts that are cut, and networks that are merely bad."""

import time

from lab import HANG, OTHER, STUCK, CannotRun
from ranks import DEADLINE, PATIENCE, Group, is_placed
from switch import Switch, Weather, both

BAD = {
    'delay': Weather(delay=0.02, jitter=0.002),
    'loss': Weather(loss=0.05),
    'reorder': Weather(delay=0.002, reorder=0.2),
    'double': Weather(double=0.2),
    'all of them': Weather(delay=0.005, jitter=0.01, loss=0.02, double=0.05, reorder=0.1),
}
# The path between two rollouts, as a whole, in one direction, or in the middle of a transfer.
BETWEEN_ROLLOUTS = ('between rollouts', 'from 1 to 2', 'from 2 to 1', 'in a transfer')
OTHERS = ('trainer to rollout', 'rollout gone')
# The path from the trainer to a rollout, where it writes to it.
IN_A_WRITE = 'in a write'


def run(lab, case, seconds=None, kind=None):
    over_tcp = [backend for backend in lab.backends(placed=True) if 'tcp' in backend]
    if not over_tcp:
        raise CannotRun('its hosts are joined by TCP alone, and need the backend nixl-tcp or nixl-tcp-placed')
    backend = case.random.choice(over_tcp)
    paths = [IN_A_WRITE] * 6 if is_placed(backend) else BETWEEN_ROLLOUTS * 3
    kind = kind or case.random.choice([*paths, *OTHERS, *BAD])
    seconds = seconds or case.random.choice([3, 7, 13])
    rollouts = case.random.choice([2, 3])
    case.about(f'{backend}, {kind}, {seconds:g} s, {rollouts} rollouts')
    with Switch(1 + rollouts, case.random.random()) as switch:
        address = f'{switch.hosts[0].address()}:{case.random.randrange(20000, 40000)}'
        with Group(lab, case, backend, rollouts, hosts=switch.hosts, address=address, interval=0.1, layers=1) as group:
            group.comes_up()
            time.sleep(case.random.uniform(0.1, 0.5))
            case.faults += 1
            disturb(case, group, switch, kind, seconds)


def disturb(case, group, switch, kind, seconds):
    victim = case.random.choice([1, 2])
    begun = time.monotonic()
    if kind in BAD:
        switch.weather = BAD[kind]
    elif kind in ('in a transfer', IN_A_WRITE):
        one, other = (1, 2) if kind == 'in a transfer' else (0, victim)
        switch.arm(one, other, case.random.randrange(20, 400))
        while switch.cut_at is None and time.monotonic() < begun + 15:
            time.sleep(0.01)
        begun = switch.cut_at or time.monotonic()
    else:
        switch.weather = Weather(cut=pairs(kind, victim, len(switch.hosts)))
    time.sleep(max(0.0, begun + seconds - time.monotonic()))
    healed = time.monotonic()
    if kind not in BAD:
        switch.weather = Weather()
    judge(case, group, kind, victim, begun, healed)
    switch.weather = Weather()
    if not group.trainer.is_alive():
        case.problem(OTHER, f'the trainer has ended: {group.describe()}')
    elif not group.is_whole(40, time.monotonic(), restart=True):
        case.problem(STUCK, f'not all are active 40 s after it healed: {group.describe()}')


def pairs(kind, victim, hosts):
    others = set(range(hosts)) - {victim}
    return {
        'between rollouts': both(1, 2),
        'from 1 to 2': frozenset({(1, 2)}),
        'from 2 to 1': frozenset({(2, 1)}),
        'trainer to rollout': frozenset({(0, victim)}),
        'rollout gone': frozenset().union(*(both(victim, other) for other in others)),
    }[kind]


def judge(case, group, kind, victim, begun, healed):
    """During the fault and soon after it, updates go on as they should."""
    after = group.trainer.next_update(PATIENCE, healed)
    if not after and group.trainer.is_alive():
        case.problem(HANG, f'no update within {PATIENCE} s after it healed: {group.describe()}')
    moments = [begun, *(at for at, _ in group.trainer.updates(begun)), *(at for at, _ in group.trainer.err if at >= begun)]
    moments = sorted([*moments, after[0] if after else time.monotonic()])
    silence = max(later - earlier for earlier, later in zip(moments, moments[1:])) if len(moments) > 1 else 0.0
    if silence > PATIENCE:
        case.problem(HANG, f'the trainer said nothing for {silence:.1f} s')
    failed = group.trainer.errors(begun)
    within = [at for at, _ in group.trainer.updates(begun) if at < healed]
    case.about(f'{len(within)} updates meanwhile, {len(failed)} failed, the longest silence {silence:.1f} s')
    if kind in BETWEEN_ROLLOUTS:
        # The trainer reaches both: what one does not get from the other it gets from the trainer.
        if len(failed) > 1:
            case.problem(STUCK, f'{len(failed)} updates failed, the path between two rollouts was cut: {failed[-1]}')
        if healed - begun > 2 * DEADLINE and not within:
            case.problem(STUCK, 'no update while the path between two rollouts was cut')
        ended = [rollout for rollout in group.rollouts.values() if not rollout.is_alive()]
        if ended:
            case.problem(STUCK, f'a rollout has ended: {group.describe()}')
    elif kind in BAD and failed:
        case.problem(OTHER, f'updates failed though the network was only bad: {failed[:2]}')
