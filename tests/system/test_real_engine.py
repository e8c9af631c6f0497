"""The real vLLM in the unit's sandbox, as its unprivileged user: it must bear every restriction."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import need
from tests.system.container import Container
from tests.system.host import Host
from tests.system.tree import cache_directory, debian_tree

pytestmark = [pytest.mark.system, pytest.mark.engine, pytest.mark.soak, pytest.mark.timeout(600)]
# `make test` has the same within test_whole_life.py, where the engine is installed by the product itself.

ENGINES = Path(os.environ.get("VLLMD_TEST_ENGINES") or cache_directory() / "engines")
FINDS_ITSELF = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
COMPLETION = """
import json, sys, urllib.request as r
body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "ignore_eos": True}).encode()
key = json.load(open("/var/lib/vllmd/public/credentials.json"))["apiKey"]
ask = r.Request("http://127.0.0.1:8000/v1/chat/completions", body, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
print(json.load(r.urlopen(ask, timeout=60))["usage"]["completion_tokens"])
"""


@pytest.fixture
def real(binds: dict[str, Path]) -> Iterator[Host]:
    need((ENGINES / "current/bin/vllm").exists(), f"a real vLLM in {ENGINES} (vllmctl engine install, or make setup)")
    with Container(debian_tree(), {**binds, "/opt/vllmd/engines": ENGINES}) as container:
        need(container.run("/opt/vllmd/engines/current/bin/python", "-c", FINDS_ITSELF, check=False).status == 0, "an engine whose Python is the container's")
        yield Host(container)


def test_real_vllm_serves_the_demo_from_its_sandbox(real: Host) -> None:
    real.install()
    done = real.run("systemctl", "enable", "--now", "vllmd@demo", timeout_s=300, check=False)
    assert done.status == 0, real.run("journalctl", "--no-pager", "-o", "cat", "-u", "vllmd@demo").out[-8000:]
    assert real.run("python3", "-c", COMPLETION, timeout_s=90).out.strip() == "4"
    assert real.unit("demo")["NRestarts"] == "0"
    real.stop("demo")
    assert real.container.processes("vllmd") == {}
    assert real.unit("demo").status == ("success", 0)
