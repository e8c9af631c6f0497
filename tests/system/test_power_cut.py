"""A power cut while models are fetched and published: what is served afterwards is the version before or the one after, whole."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import need
from tests.system import machine, power_cut_guest
from vllmd.models import contents
from vllmd.models.contents import Contents

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]

CUTS = int(os.environ.get("VLLMD_SOAK_CUTS", "20"))
SPAN_S = 6.0
"""About the time of one version: a cut falls anywhere in it."""


@pytest.fixture(scope="module")
def system_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    need(os.geteuid() == 0, "root (loop mounts)")
    need(machine.can_run(), "qemu-system-x86_64 and Debian's packages")
    image = machine.system_disk(tmp_path_factory.mktemp("machine"), "tests.system.power_cut_guest")
    yield image
    image.unlink()


def test_power_cut_leaves_the_version_before_or_the_one_after(system_disk: Path, tmp_path: Path) -> None:
    _cut(system_disk, tmp_path, 1, random.Random())


@pytest.mark.soak
def test_many_power_cuts_on_one_disk(system_disk: Path, tmp_path: Path) -> None:
    _cut(system_disk, tmp_path, CUTS, random.Random())


def _cut(system: Path, tmp_path: Path, cuts: int, chance: random.Random) -> None:
    disk = machine.blank_disk(tmp_path / "store.img", 300)
    claimed = 0
    for number in range(cuts):
        console = tmp_path / f"console-{number}"
        with machine.Machine(system, disk, console) as guest:
            guest.wait_for("GUEST BEGUN")
            if claimed == 0:
                guest.wait_for("GUEST PUBLISHED 1 ")
            time.sleep(chance.uniform(0, SPAN_S))
            guest.cut_power()
            said = guest.said()
        assert "Traceback" not in said, said[-3000:]
        claimed = max([claimed, *(int(match) for match in re.findall(r"GUEST PUBLISHED (\d+) [0-9a-f]{64} \.", said))])
        with machine.mounted(disk) as place:
            served = _served(place / "models")
        print(f"cut {number + 1}: published {claimed} was claimed, {served} is served")
        assert claimed <= served <= claimed + 1, said[-3000:]
        claimed = served


def _served(store: Path) -> int:
    """The number of the version that the link leads to, every byte of which is compared with its manifest."""
    link = store / power_cut_guest.LABEL
    target = link.readlink()
    assert target.parts[:2] == (".published", power_cut_guest.LABEL)
    versions = [path for path in (store / ".published" / power_cut_guest.LABEL).iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
    assert target.name in {path.name for path in versions}
    found = {path.name: _whole(path) for path in versions}
    return int(found[target.name].revision)


def _whole(version: Path) -> Contents:
    manifest = contents.read(version)
    assert manifest.sha256 == version.name
    for name, entry in manifest.files.items():
        assert hashlib.sha256((version / name).read_bytes()).hexdigest() == entry.sha256, f"{version}/{name} is not whole"
    return manifest
