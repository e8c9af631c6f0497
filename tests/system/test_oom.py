"""The kernel ends the engine, or the supervisor, because the unit's memory ran out: in a machine that has that controller."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import measured
from tests.needs import need
from tests.system import machine

pytestmark = [pytest.mark.system, pytest.mark.matrix, pytest.mark.soak, pytest.mark.timeout(900)]


def test_the_kernel_s_choice_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """The row's times are those of an emulated processor, ten times slower than others."""
    need(os.geteuid() == 0, "root (to copy a Debian tree)")
    need(machine.can_run(), "qemu-system-x86_64 and Debian's packages")
    image = machine.installed_disk(tmp_path, "tests.system.oom_guest")
    with measured("OOM kill of the engine (emulated machine)") as engine, measured("OOM kill of the supervisor (emulated machine)") as supervisor:
        with machine.Machine(image, None, tmp_path / "console", memory_mb=1024) as guest:
            guest.wait_for("GUEST SET UP")
            guest.wait_for('"victim": "engine"')
            guest.wait_for('"victim": "supervisor"')
            guest.wait_for("GUEST DONE")
            said = guest.said()
        image.unlink()
        results = {each["victim"]: each for each in map(json.loads, re.findall(r"GUEST RESULT (\{.*\}) \.", said))}
        first, second = results["engine"], results["supervisor"]
        for row, found in ((engine, first), (supervisor, second)):
            row.empty_s = found["took_s"]
            row.said = str(found["unit"] | {"error": (found["error"] or {}).get("code")})
        assert_nothing_left(first)
        assert first["unit"]["Result"] == "exit-code", "the supervisor itself must have lived to say why"
        assert first["unit"]["ExecMainStatus"] == "70"
        assert first["error"]["code"] == "host_out_of_memory", first
        assert_nothing_left(second)
        assert second["unit"]["NRestarts"] == "1"
        assert second["supervisor_again"]


def assert_nothing_left(found: dict[str, Any]) -> None:
    assert found["engine"] >= 3
    assert found["left"] == []
    assert found["kernel"], "the kernel must have killed something"
