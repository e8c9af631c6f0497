"""Caches of compiled code: which one an instance uses, and what `vllmctl cache` says and removes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.json_docs import differences
from tests.needs import need
from tests.unit.engine_contexts import context
from vllmd.config.paths import Paths, root_paths
from vllmd.ctl import cache as ctl_cache
from vllmd.engines import caches
from vllmd.engines.protocol import Context
from vllmd.engines.vllm import Vllm
from vllmd.errors import TryLater, UsageError
from vllmd.system import hardware as hardware_module
from vllmd.system import sharedlock
from vllmd.system.hardware import Hardware, PciGpu, look, of_this_host

pytestmark = pytest.mark.unit

CPU = Hardware("x86_64", frozenset({"avx", "avx2", "fma", "nopti"}))
H200 = replace(CPU, gpus=(PciGpu("nvidia", "2335"),) * 4, nvidia_driver="580.95.05")
MI300 = replace(CPU, gpus=(PciGpu("amd", "74a1"),) * 8, amd_driver="6.12.0-1")


def cuda(root: Path, gpus: object = "all") -> Context:
    return context(root, {"gpus": gpus}, variant="cuda", cuda="13.0", name="vllm-0.32.0-cuda")


def test_the_name_tells_engine_gpus_and_driver(tmp_path: Path) -> None:
    assert caches.name(cuda(tmp_path), H200) == "vllm-0.32.0-cuda+nvidia-2335x4+580.95.05"
    assert caches.name(cuda(tmp_path, "2"), H200) == "vllm-0.32.0-cuda+nvidia-2335x2+580.95.05"
    assert caches.name(cuda(tmp_path, "GPU-a,GPU-b,GPU-c"), H200) == "vllm-0.32.0-cuda+nvidia-2335x3+580.95.05"
    rocm = context(tmp_path, variant="rocm", rocm="7.0", name="vllm-0.32.0-rocm")
    assert caches.name(rocm, MI300) == "vllm-0.32.0-rocm+amd-74a1x8+6.12.0-1"


@pytest.mark.parametrize(
    "other",
    [
        replace(H200, nvidia_driver="580.105.08"),
        replace(H200, gpus=(PciGpu("nvidia", "2901"),) * 4),
        replace(H200, gpus=(PciGpu("nvidia", "2335"),) * 2),
    ],
    ids=["driver", "model", "number"],
)
def test_other_hardware_has_another_cache(tmp_path: Path, other: Hardware) -> None:
    assert caches.name(cuda(tmp_path), other) != caches.name(cuda(tmp_path), H200)


def test_an_engine_that_uses_no_gpu_is_told_by_the_processors_instructions(tmp_path: Path) -> None:
    own = context(tmp_path, name="vllm-0.32.0-cpu")
    assert caches.name(own, CPU) == caches.name(own, H200)
    assert caches.name(own, CPU) == caches.name(own, replace(CPU, cpu_flags=CPU.cpu_flags | {"mitigation"}))
    assert caches.name(own, CPU) != caches.name(own, replace(CPU, cpu_flags=CPU.cpu_flags | {"avx512f"}))
    assert caches.name(cuda(tmp_path, "none"), H200).endswith(caches.processor(CPU))


def test_an_engine_from_elsewhere_is_told_by_its_path(tmp_path: Path) -> None:
    one, other = (context(tmp_path, executable=f"/opt/{each}/bin/vllm") for each in ("a", "b"))
    assert caches.name(one, CPU) != caches.name(other, CPU)
    assert "/" not in caches.name(context(tmp_path, version="../../x"), CPU)


def test_every_compiler_writes_into_the_instances_cache(tmp_path: Path) -> None:
    own = context(tmp_path)
    env = Vllm().command(own, "/m").env
    place = caches.place(own)
    assert place.parent == tmp_path / "cache/compiled"
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "FLASHINFER_WORKSPACE_BASE", "TVM_FFI_CACHE_DIR", "DG_JIT_CACHE_DIR"):
        assert env[name].startswith(f"{place}/"), name
    assert all(place in each.parents for each in Vllm().compile_caches(own))
    assert place in Vllm().holds(own)


def test_the_hardware_is_read_without_asking_a_driver(tmp_path: Path) -> None:
    devices = {"0": ("0x10de", "0x030200", "0x2335"), "1": ("0x10de", "0x040300", "0x22bd"), "2": ("0x1002", "0x120000", "0x74a1"), "3": ("0x8086", "0x030000", "0x1")}
    for name, words in devices.items():
        at = tmp_path / "sys/bus/pci/devices" / name
        at.mkdir(parents=True)
        for file, word in zip(("vendor", "class", "device"), words, strict=True):
            (at / file).write_text(f"{word}\n")
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx avx2\n\nprocessor\t: 1\nflags\t\t: other\n")
    found = look(tmp_path / "sys", tmp_path / "proc", "x86_64")
    assert found.gpus == (PciGpu("amd", "74a1"), PciGpu("nvidia", "2335"))
    assert found.nvidia_driver == "580.95.05"
    assert found.amd_driver
    assert found.cpu_flags == {"fpu", "avx", "avx2"}
    (tmp_path / "sys/module/nvidia").mkdir()
    (tmp_path / "sys/module/nvidia/version").write_text("580.105.08\n")
    assert look(tmp_path / "sys", tmp_path / "proc").nvidia_driver == "580.105.08"
    assert look(tmp_path / "none", tmp_path / "none", "arm64") == Hardware("arm64")


# -- vllmctl cache


def begun(root: Path, name: str, *, is_installed: bool = True) -> Path:
    program = root / "engines" / name / "bin/vllm"
    if is_installed:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch()
    own = context(root, name=name, executable=str(program))
    assert caches.begin(own) == ""
    place = caches.place(own)
    (place / "inductor").mkdir()
    (place / "inductor/kernel.so").write_bytes(bytes(100_000))
    return place


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return root_paths(tmp_path)


def run(paths: Paths, *argv: str) -> int:
    return ctl_cache.main(list(argv), paths)


def rows(paths: Paths, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    capsys.readouterr()
    assert run(paths, "list", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert differences("vllmctl cache list --json", document) == []
    return {row["engine"]: row for row in document["caches"]}


def test_the_list_tells_size_use_and_what_it_is_for(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = begun(tmp_path, "vllm-1-cpu")
    begun(tmp_path, "vllm-2-cpu", is_installed=False)
    release = sharedlock.share(place)
    found = rows(paths, capsys)
    assert found["vllm-1-cpu"]["in_use"]
    assert found["vllm-1-cpu"]["instance"] == "demo"
    assert isinstance(found["vllm-1-cpu"]["bytes"], int)
    assert found["vllm-1-cpu"]["bytes"] >= 100_000
    assert found["vllm-2-cpu"]["why_unused"] == "its engine is gone"
    run(paths, "list")
    text = capsys.readouterr().out
    assert "in use by demo" in text
    assert "unused: its engine is gone" in text
    release()
    run(paths, "list")
    assert "used just now by demo" in capsys.readouterr().out


def test_what_an_instance_uses_is_never_cleared(paths: Paths, tmp_path: Path) -> None:
    place = begun(tmp_path, "vllm-1-cpu")
    release = sharedlock.share(place)
    with pytest.raises(TryLater, match="in use"):
        run(paths, "clear", place.name)
    assert run(paths, "clear", "--all") == 0
    assert (place / "inductor/kernel.so").exists()
    release()
    assert run(paths, "clear", place.name) == 0
    assert list(place.parent.iterdir()) == []


def test_what_another_user_left_in_a_cache_stays_and_keeps_no_other(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """root ran the engine by hand once, in the service's cache: then no clearing of any cache came to its end."""
    need(os.geteuid() == 0, "root, which acts as the owner of the cache")
    first, last = begun(tmp_path, "vllm-1-cpu"), begun(tmp_path, "vllm-2-cpu")
    for above in (tmp_path, *tmp_path.parents):
        if above != Path("/") and not above.stat().st_mode & 1:
            above.chmod(0o711)
    for path in (tmp_path / "cache", first.parent, last, *last.rglob("*")):
        os.chown(path, 65534, 65534)
    assert run(paths, "clear", "--all") == 0
    assert not last.exists()
    [aside] = first.parent.iterdir()
    assert f"rm -r {aside}" in capsys.readouterr().err
    assert os.geteuid() == 0


def test_root_executes_nothing_out_of_a_cache_that_another_account_can_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(os.geteuid() == 0, "root")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    theirs = root_paths(tmp_path / "theirs")
    assert caches.trusted(theirs) == theirs
    theirs.cache.mkdir(parents=True)
    os.chown(theirs.cache, 65534, 65534)
    assert caches.trusted(theirs) == replace(theirs, cache=tmp_path / "home/.cache/vllmd")


def test_unused_are_those_of_engines_that_are_gone_and_what_was_broken(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, gone = begun(tmp_path, "vllm-1-cpu"), begun(tmp_path, "vllm-2-cpu", is_installed=False)
    other = kept.with_name("vllm-1-cpu+nvidia-ffffx1+1.2")
    kept.with_name(other.name).mkdir()
    broken = kept / "vllm/torch_compile_cache.bad-20260101"
    broken.mkdir(parents=True)
    assert run(paths, "clear", "--unused") == 0
    assert kept.exists()
    assert not [each for each in (gone, other, broken) if each.exists()]
    assert "other GPUs" in capsys.readouterr().err


def test_another_processor_or_driver_makes_a_cache_unused(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, "vllm-1-cpu")
    assert rows(paths, capsys)["vllm-1-cpu"]["why_unused"] == ""
    monkeypatch.setattr(ctl_cache, "of_this_host", lambda: replace(of_this_host(), cpu_flags=frozenset({"avx10"})))
    assert rows(paths, capsys)["vllm-1-cpu"]["why_unused"] == "it was made for another processor"


@pytest.mark.parametrize("name", ["none", "..", "../../etc", ".", ""])
def test_only_a_listed_cache_is_cleared(paths: Paths, tmp_path: Path, name: str) -> None:
    begun(tmp_path, "vllm-1-cpu")
    with pytest.raises(UsageError):
        run(paths, "clear", name)
    assert (tmp_path / "cache/compiled").is_dir()


def test_a_note_that_is_none_breaks_nothing(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a+b", "["), ("c", '{"used_at": 7, "engine": "\\u001b[31m"}')):
        (tmp_path / "cache/compiled" / name).mkdir(parents=True)
        (tmp_path / "cache/compiled" / name / caches.NOTE).write_text(content)
    os.mkfifo(tmp_path / "cache/compiled/c/fifo")
    assert run(paths, "list") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_links_are_no_caches_and_are_not_followed(paths: Paths, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    place = begun(tmp_path, "vllm-1-cpu")
    (place.parent / "link").symlink_to(precious)
    (place / "inside").symlink_to(precious)
    assert run(paths, "clear", "--all") == 0
    assert (precious / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_works_as_the_owner_of_the_caches(paths: Paths, tmp_path: Path) -> None:
    """Who owns the directory can put links in the way: root's removals must reach no further than the owner's own."""
    precious = tmp_path / "precious/vllm-1-cpu"
    precious.mkdir(parents=True)
    begun(tmp_path, "vllm-1-cpu")
    folder = tmp_path / "cache/compiled"
    folder.rename(tmp_path / "aside")
    folder.symlink_to(precious.parent)
    for each in (tmp_path, *tmp_path.parents):
        if each != Path("/tmp") and each.is_relative_to("/tmp"):
            each.chmod(0o755)
    os.chown(paths.cache, 65534, 65534)
    with pytest.raises(Exception, match=r"[Pp]ermission"):
        run(paths, "clear", "--all")
    assert precious.exists()
    assert os.geteuid() == 0


def test_a_cache_that_cannot_be_made_is_told_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    served, said = Vllm().prepare(context(tmp_path), tmp_path)
    assert served == tmp_path
    assert "cannot be used" in said


def test_this_host_is_looked_at_once() -> None:
    assert hardware_module.of_this_host() is hardware_module.of_this_host()
