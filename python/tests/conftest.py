"""What the tests share."""

from __future__ import annotations

import faulthandler

import pytest

import ckpt_engine

import ranks


@pytest.fixture(autouse=True)
def no_test_hangs():
    """A test that hangs says where, and ends."""
    faulthandler.dump_traceback_later(90, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def trainer():
    """A control plane of rank 0."""
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", ckpt_engine.generate_token()) as control:
        yield control


@pytest.fixture
def group():
    """Makes a trainer of this process with rollouts in others; all of them are ended."""
    groups: list[ranks.Group] = []

    def make(*arguments, **keywords) -> ranks.Group:
        groups.append(ranks.Group(*arguments, **keywords))
        return groups[-1]

    yield make
    for each in groups:
        each.end()


@pytest.fixture
def local():
    """A trainer and a rollout of this process."""
    trainer, (rollout,) = ckpt_engine.form_local_group({"backend": "naive", "timeout_seconds": 20})
    yield trainer, rollout
    trainer.finalize()
    rollout.finalize()
