"""The installed real engine: what it knows of itself, whether it is whole, and where it compiles to (with torch.compile, not eager)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Instance
from vllmd.config.paths import root_paths
from vllmd.ctl import cache as ctl_cache
from vllmd.engines import packages, record, verify, vllm_inspect

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture
def engine(real_engine: Path) -> Path:
    return real_engine.resolve().parent.parent


def test_it_tells_what_it_can_do_and_what_it_was_built_for(engine: Path, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "VLLM_CACHE_ROOT": str(tmp_path), "VLLM_NO_USAGE_STATS": "1", "PATH": "/usr/bin:/bin"}
    answer = subprocess.run([engine / "bin/python3", "-I", vllm_inspect.__file__], env=env, capture_output=True, text=True, timeout=300, check=True)
    known = json.loads(answer.stdout.splitlines()[-1])
    installed = record.read(engine)
    assert installed is not None
    assert (known["torch"], known["cuda"], known["rocm"], known["archs"]) == (installed.torch, "", "", [])
    assert set(installed.flags) == set(known["flags"])
    assert known["python"].count(".") == 2


def test_every_file_is_as_pip_recorded_it(engine: Path) -> None:
    report = verify.verify(engine)
    changed = report.changed if packages.sealed(engine) is not None else [each for each in report.changed if not each.startswith("bin/")]
    assert (changed, report.missing, report.packages) == ([], [], [])
    assert report.bytes > 1 << 30
    assert report.checked - report.without_hash > 10_000


@pytest.fixture
def compiling(real_engine: Path, tiny_models: Path) -> Iterator[Instance]:
    config = {"engine": {"args": {"dtype": "float32"}, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}}
    with Instance(config=config, engine=real_engine) as made:
        yield made


def test_what_it_compiles_lies_in_the_instances_cache(compiling: Instance, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiling.wait_ready(400)
    ctl_cache.main(["list", "--json"], root_paths(compiling.root))
    (row,) = json.loads(capsys.readouterr().out)["caches"]
    assert row["name"].startswith(f"{engine.name}+")
    assert row["in_use"]
    cache = compiling.root / "cache"
    place = cache / "compiled" / row["name"]
    assert list(place.glob("vllm/torch_compile_cache/*"))
    beside = {each.name for each in cache.iterdir()} - {"compiled"}
    assert not beside & {"vllm", "inductor", "triton", "cuda", ".cache", ".triton", "flashinfer"}, beside
    print(sorted(each.relative_to(cache) for each in cache.glob("*/*")), sorted(each.relative_to(place) for each in place.glob("*/*")))
