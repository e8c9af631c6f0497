"""doctor's looks: none holds it up, and none outlives it."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest

from vllmd.ctl.doctor.jobs import Job
from vllmd.errors import ConfigError

pytestmark = pytest.mark.unit


def test_no_look_outlives_who_waits_for_it() -> None:
    reading, writing = os.pipe()
    waiting = os.fork()
    if not waiting:
        Job(lambda: (os.write(writing, b"begun"), select.select([], [], [], 60)), 60.0).outcome()
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 5) == b"begun"
    os.kill(waiting, signal.SIGKILL)
    os.waitpid(waiting, 0)
    assert select.select([reading], [], [], 10)[0], "the look had the other end"
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_look_that_hangs_is_left_at_its_deadline_and_costs_the_others_nothing() -> None:
    began = time.monotonic()
    stuck, quick = Job(lambda: time.sleep(60), 0.3), Job(lambda: "seen", 5.0)
    assert quick.outcome().value == "seen"
    assert stuck.outcome().why == "no answer within 0.3 s"
    assert time.monotonic() - began < 3


def test_a_look_that_fails_says_why() -> None:
    def refuse() -> str:
        raise ConfigError("code", "it is so", "hint")

    def crash() -> str:
        os._exit(3)

    assert Job(refuse, 5.0).outcome().why == "it is so"
    assert Job(lambda: 1 // 0, 5.0).outcome().why == "ZeroDivisionError: integer division or modulo by zero"
    assert Job(crash, 5.0).outcome().why == "it ended without an answer"
