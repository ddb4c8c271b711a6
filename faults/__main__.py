"""Faults from the outside against real groups of `ckpt-engine`. Run by `cargo xtask faults`; Python's own library alone.

Prints a line for each case and a table at the end. A case that fails is printed with what replays it: its seed fixes
whom a fault meets, how and when, and not how fast the machine is."""

import argparse
import importlib
import os
import random
import signal
import sys
import time
import traceback

from lab import BACKENDS, INSIDE, KINDS, OTHER, PLACED, STUCK, CannotRun, Lab, NoGroup, can_enter, enter

# How many groups of a class may not form before anything was done to them, beside a tenth of them.
ALLOWED_UNFORMED = 2

CLASSES = ('kill', 'stop', 'flip', 'mitm', 'cut', 'exhaustion', 'soak')


def options():
    parser = argparse.ArgumentParser(prog='cargo xtask faults', description=__doc__)
    parser.add_argument('classes', nargs='*', metavar='CLASS', help=f'of {", ".join(CLASSES)}; all without it')
    parser.add_argument('--program', required=True, help='the ckpt-engine to test')
    parser.add_argument('--seed', type=int, help='what all choices depend on; a random one without it')
    parser.add_argument('--minutes', type=float, default=3.0, help='how long, of all classes together')
    parser.add_argument('--case', type=int, help='only this case of the class')
    parser.add_argument('--backend', choices=(*BACKENDS, *PLACED), help='only this transport')
    parser.add_argument('--seconds', type=float, help='how long paths are cut, in the class cut')
    parser.add_argument('--kind', help='what happens to the network, in the class cut')
    parser.add_argument('--verbose', action='store_true', help='print what the programs say in cases that fail')
    chosen = parser.parse_args()
    unknown = set(chosen.classes) - set(CLASSES)
    if unknown:
        parser.error(f'there is no class {", ".join(unknown)}: {", ".join(CLASSES)}')
    chosen.classes = chosen.classes or list(CLASSES)
    if chosen.seed is None:
        chosen.seed = random.SystemRandom().randrange(1 << 31)
    return chosen


def main():
    chosen = options()
    require_all = os.environ.get('CKPT_ENGINE_REQUIRE_ALL') == '1'
    if INSIDE not in os.environ and (reason := can_enter()):
        print(f'-- faults: ignored, namespaces cannot be made: {reason}')
        return 1 if require_all else 0
    enter()
    # Programs that are started in the background by a shell inherit that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lab = Lab(chosen)
    print(f'seed {chosen.seed}, {chosen.minutes} minutes, {lab.program}', flush=True)
    cases, ignored = [], {}
    if not lab.nixl:
        ignored['nixl'] = 'CKPT_ENGINE_NIXL_DIR names no folder'
        print(f'-- the transport nixl: ignored: {ignored["nixl"]}', flush=True)
    try:
        for at, cls in enumerate(chosen.classes):
            # What a class leaves of its time is for the others.
            left = chosen.minutes * 60 - (time.monotonic() - BEGAN)
            until = time.monotonic() + left / (len(chosen.classes) - at)
            try:
                for case in run_class(lab, chosen, cls, until):
                    cases.append(case)
                    tell(case, chosen)
            except CannotRun as error:
                ignored[cls] = str(error)
                print(f'-- {cls}: ignored: {error}', flush=True)
    finally:
        lab.close()
    table(cases, ignored)
    failed = any(case.problems for case in cases) or (require_all and ignored)
    return 1 if failed else 0


def run_class(lab, chosen, cls, until):
    number = chosen.case or 0
    unformed = 0
    while True:
        begun = time.monotonic()
        case = run_case(lab, chosen, cls, number, until)
        if case.is_late() and is_busy():
            # Deadlines of seconds are missed by what nobody lets run. What is broken is so again.
            case = run_case(lab, chosen, cls, number, until)
            case.about('the second try, on a machine that was busy')
        if not case.has_group:
            unformed += 1
            if unformed > ALLOWED_UNFORMED + number // 10:
                case.problem(STUCK, 'groups do not form')
        case.seconds = time.monotonic() - begun
        yield case
        number += 1
        # A case that takes as long as this one has to fit.
        if chosen.case is not None or cls == 'soak' or time.monotonic() + case.seconds / 2 > until:
            return


def run_case(lab, chosen, cls, number, until):
    module = importlib.import_module(cls)
    case = lab.case(cls, number)
    try:
        if cls == 'cut':
            module.run(lab, case, chosen.seconds, chosen.kind)
        elif cls == 'soak':
            module.run(lab, case, until - time.monotonic())
        else:
            module.run(lab, case)
    except NoGroup as error:
        case.has_group = False
        case.about(f'no group, not counted: {error}')
    except CannotRun:
        raise
    except Exception:
        case.problem(OTHER, f'the case itself broke: {traceback.format_exc()}')
    return case


def is_busy():
    """Whether twice as much wants to run as can."""
    return os.getloadavg()[0] > 2 * os.cpu_count()


def tell(case, chosen):
    verdict = 'FAILED' if case.problems else 'ok'
    print(f'{case.cls:<11}{case.number:>4} {case.seconds:7.1f} s  {verdict:<7}{"; ".join(case.what)}', flush=True)
    for kind, text in case.problems:
        print(f'    {kind}: {text[:2000]}', flush=True)
    if case.problems:
        print(f'    replay: cargo xtask faults {case.cls} --seed {case.seed} --case {case.number}', flush=True)


def table(cases, ignored):
    print(f'\n{"class":<12}{"cases":>6}{"faults":>8}' + ''.join(f'{kind:>15}' for kind in KINDS))
    for cls in CLASSES:
        of_class = [case for case in cases if case.cls == cls]
        if cls in ignored and not of_class:
            print(f'{cls:<12}ignored: {ignored[cls]}')
        elif of_class:
            counts = [sum(kind == found for case in of_class for found, _ in case.problems) for kind in KINDS]
            faults = sum(case.faults for case in of_class)
            print(f'{cls:<12}{len(of_class):>6}{faults:>8}' + ''.join(f'{count:>15}' for count in counts))
    sys.stdout.flush()


BEGAN = time.monotonic()
if __name__ == '__main__':
    sys.exit(main())
