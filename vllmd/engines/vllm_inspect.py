"""Run once by an engine's own Python at its installation: prints as JSON what that vLLM can do.

Never imported by vllmd. Building the parser takes 10 to 20 s of imports, which is why the answer is kept beside the
engine: a wrong flag is then told in milliseconds instead of by argparse after those imports. Must run on Python 3.10.
"""

import contextlib
import importlib
import json
import platform
import sys
from typing import Any

PARSER_MODULES = ("vllm.utils.argparse_utils", "vllm.utils")
ARGUMENT_MODULES = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")
"""vLLM moves these between versions: the newest place first."""


def first_with(attribute: str, modules: tuple[str, ...]) -> Any:
    for name in modules:
        with contextlib.suppress(ImportError):
            if hasattr(module := importlib.import_module(name), attribute):
                return getattr(module, attribute)
    raise SystemExit(f"this vLLM has no {attribute} in {', '.join(modules)}")


def assume_cpu_without_a_driver() -> None:
    platforms: Any = importlib.import_module("vllm.platforms")
    if platforms.current_platform.is_unspecified():  # a CUDA build where no driver is: its flags are the same
        platforms.current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()


def options() -> dict[str, bool]:
    """Every spelling of every option of `vllm serve`, and whether it stands alone (takes no value)."""
    assume_cpu_without_a_driver()
    parser_class = first_with("FlexibleArgumentParser", PARSER_MODULES)
    parser = first_with("make_arg_parser", ARGUMENT_MODULES)(parser_class())
    return {name: action.nargs == 0 for action in parser._actions for name in action.option_strings}


def toolkit() -> dict[str, Any]:
    torch = importlib.import_module("torch")
    architectures = getattr(torch._C, "_cuda_getArchFlags", str)  # torch.cuda.get_arch_list() is empty without a GPU
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "rocm": getattr(torch.version, "hip", None) or "",
        "archs": (architectures() or "").split(),
        "python": platform.python_version(),
    }


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        found = options()
        known = {
            "flags": sorted(found),
            "switches": sorted(name for name, alone in found.items() if alone),
            **toolkit(),
        }
    sys.stdout.write(json.dumps(known) + "\n")


if __name__ == "__main__":
    main()
