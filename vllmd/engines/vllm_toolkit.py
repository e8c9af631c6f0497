"""CUDA's compiler for kernels that are made at run time (FlashInfer, DeepGEMM, torch's extensions), from pip's packages.

They lie in site-packages/nvidia: since CUDA 13 one tree, cu13/{bin,include,lib,nvvm}; before it a tree for each part,
cuda_nvcc/bin, cuda_runtime/include, ... Nobody looks there unless told, and the host's own toolkit goes first.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

LINKS = "lib/vllmd-cuda"
"""Below the engine: libcudart.so and the like. pip's packages have only libcudart.so.13, which a linker does not look for."""

_HOST = Path("/usr/local/cuda")
_NAMES = ("CUDA_HOME", "CUDA_PATH")
_LIBRARY = re.compile(r"(lib[\w+-]+\.so)\.\d+")


def environment(directory: Path, path: str, given: Mapping[str, str], host: Path | None = None) -> dict[str, str]:
    """CUDA_HOME, CPATH and LIBRARY_PATH, where the engine in this directory brings nvcc and the host has none; else {}.
    `path` is the engine's PATH; `given` are variables that say already where it is."""
    if any(given.get(name) for name in _NAMES) or shutil.which("nvcc", path=path) or os.access((host or _HOST) / "bin/nvcc", os.X_OK):
        return {}
    home = next((nvcc.parent.parent for nvcc in _parts(directory, "bin/nvcc") if os.access(nvcc, os.X_OK)), None)
    if home is None:
        return {}
    headers = [home / "include", *(each for each in _parts(directory, "include") if each.parent != home)]
    libraries = [directory / LINKS, *_parts(directory, "lib")]
    return {
        "CUDA_HOME": str(home),
        "CPATH": ":".join(str(each) for each in headers if each.is_dir()),
        "LIBRARY_PATH": ":".join(str(each) for each in libraries if each.is_dir()),
    }


def _parts(directory: Path, what: str) -> list[Path]:
    """The newest tree first: cu13 before cuda_nvcc."""
    found = directory.glob(f"lib/python3*/site-packages/nvidia/*/{what}")
    return sorted(found, key=lambda each: (not re.search(r"/nvidia/cu\d+/", str(each)), str(each)))


def make_usable(directory: Path) -> None:
    """At the installation: programs that lost their mode on the way into a wheel, and names that a linker looks for."""
    for program in (*_parts(directory, "bin/*"), *_parts(directory, "nvvm/bin/*")):
        if program.is_file() and not program.is_symlink():
            program.chmod(program.stat().st_mode | 0o111)
    links = directory / LINKS
    for library in _parts(directory, "lib/lib*.so.*"):
        name = _LIBRARY.fullmatch(library.name)
        if name and not library.with_name(name[1]).exists():
            links.mkdir(exist_ok=True)
            link = links / name[1]
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(library, links))
