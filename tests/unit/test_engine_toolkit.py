"""nvcc and headers of pip's CUDA packages, in the environment of an engine on a host that has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.engine_contexts import context
from vllmd.engines import vllm_toolkit
from vllmd.engines.vllm import Vllm

pytestmark = pytest.mark.unit

CU13 = ("cu13/bin/nvcc", "cu13/nvvm/bin/cicc", "cu13/include/cuda.h", "cu13/lib/libcudart.so.13", "cu13/lib/libnvrtc.so.13", "cudnn/include/cudnn.h", "cudnn/lib/libcudnn.so.9")
CU12 = ("cuda_nvcc/bin/nvcc", "cuda_nvcc/nvvm/bin/cicc", "cuda_nvcc/include/crt/x.h", "cuda_runtime/include/cuda.h", "cuda_runtime/lib/libcudart.so.12")


def engine(root: Path, files: tuple[str, ...]) -> Path:
    packages = root / "lib/python3.12/site-packages/nvidia"
    for name in files:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).touch()
    vllm_toolkit.make_usable(root)
    return packages


def found(root: Path, **given: str) -> dict[str, str]:
    return vllm_toolkit.environment(root, str(root / "nothing"), given, root / "no-host-cuda")


def test_the_tree_of_cuda_13_is_a_toolkit(tmp_path: Path) -> None:
    packages = engine(tmp_path, CU13)
    env = found(tmp_path)
    assert env["CUDA_HOME"] == str(packages / "cu13")
    assert env["CPATH"].split(":") == [str(packages / "cu13/include"), str(packages / "cudnn/include")]
    assert str(packages / "cu13/lib") in env["LIBRARY_PATH"].split(":")


def test_the_parts_of_cuda_12_are_put_together(tmp_path: Path) -> None:
    packages = engine(tmp_path, CU12)
    env = found(tmp_path)
    assert env["CUDA_HOME"] == str(packages / "cuda_nvcc")
    assert set(env["CPATH"].split(":")) == {str(packages / "cuda_nvcc/include"), str(packages / "cuda_runtime/include")}


def test_a_linker_finds_the_libraries_by_their_plain_names(tmp_path: Path) -> None:
    packages = engine(tmp_path, CU13)
    links = tmp_path / vllm_toolkit.LINKS
    assert (links / "libcudart.so").resolve() == packages / "cu13/lib/libcudart.so.13"
    assert found(tmp_path)["LIBRARY_PATH"].split(":")[0] == str(links)
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)  # the installation renames it
    assert (moved / vllm_toolkit.LINKS / "libcudart.so").exists()
    moved.rename(tmp_path)


def test_programs_are_made_executable(tmp_path: Path) -> None:
    packages = engine(tmp_path, CU13)
    assert (packages / "cu13/bin/nvcc").stat().st_mode & 0o111 == 0o111
    assert (packages / "cu13/nvvm/bin/cicc").stat().st_mode & 0o111 == 0o111


def test_the_hosts_own_toolkit_goes_first(tmp_path: Path) -> None:
    engine(tmp_path, CU13)
    assert found(tmp_path, CUDA_HOME="/opt/cuda") == {}
    assert found(tmp_path, CUDA_PATH="/opt/cuda") == {}
    nvcc = tmp_path / "usr/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(0o755)
    nvcc.chmod(0o755)
    assert vllm_toolkit.environment(tmp_path, str(nvcc.parent), {}, tmp_path / "none") == {}
    assert vllm_toolkit.environment(tmp_path, "/nothing", {}, tmp_path / "usr") == {}


def test_without_nvcc_nothing_is_said(tmp_path: Path) -> None:
    engine(tmp_path, ("cuda_runtime/include/cuda.h", "cuda_nvcc/bin/ptxas"))
    assert found(tmp_path) == {}


def test_a_cuda_engine_gets_it_and_a_person_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = engine(tmp_path, CU13)
    monkeypatch.setattr(vllm_toolkit, "_HOST", tmp_path / "none")
    executable = str(tmp_path / "bin/vllm")
    environ = {"PATH": str(tmp_path / "nothing")}
    env = Vllm().command(context(tmp_path, environ=environ, executable=executable, variant="cuda", cuda="13.0"), "/m").env
    assert env["CUDA_HOME"] == str(packages / "cu13")
    assert env["PATH"].split(":")[:2] == [str(tmp_path / "bin"), str(packages / "cu13/bin")]
    assert "CUDA_HOME" not in Vllm().command(context(tmp_path, environ=environ, executable=executable), "/m").env
    own = {"engine.env": {"CPATH": "/mine"}}
    assert Vllm().command(context(tmp_path, own, environ, executable=executable, variant="cuda", cuda="13.0"), "/m").env["CPATH"] == "/mine"
