"""Updates for a long time, without faults: nothing may grow."""

import time

from lab import LEAK, OTHER
from ranks import Group

# The growth of anonymous memory for each thousand updates, behind the first quarter, in kB; and that of a short run,
# in which an allocator has not settled.
GROWTH, SETTLING = 200, 2000


def run(lab, case, seconds):
    backend = case.random.choice(lab.backends())
    with Group(lab, case, backend, 2, bucket=None, verify=False) as group:
        group.comes_up()
        samples = []
        end = time.monotonic() + max(10.0, seconds - 5)
        while time.monotonic() < end and group.trainer.is_alive():
            time.sleep(min(1.0, max(0.05, seconds / 40)))
            usage = {process.name: process.usage() for process in group.present()}
            if all(usage.values()):
                samples.append((group.trainer.last(), usage))
        if group.trainer.errors():
            case.problem(OTHER, f'an update failed without a fault: {group.trainer.errors()[0]}')
    first, last = samples[len(samples) // 4], samples[-1]
    updates = last[0] - first[0]
    case.about(f'{backend}, {last[0]} updates')
    for name, usage in last[1].items():
        before = first[1][name]
        memory = usage['anonymous kB'] - before['anonymous kB']
        case.about(f'{name} {memory:+} kB in {updates}')
        if memory > SETTLING + GROWTH * updates / 1000:
            case.problem(LEAK, f'{name} has grown by {memory} kB in {updates} updates')
        for what in ('descriptors', 'threads'):
            if usage[what] > before[what] + 2:
                case.problem(LEAK, f'{name} had {before[what]} {what} and has {usage[what]}')
