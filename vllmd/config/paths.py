"""Where everything lies: constants for the system, XDG directories for `--user`, one directory for `--root`."""

from __future__ import annotations

import os
import pwd
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Paths:
    """The five roots. `scope` is 'system', 'user' or 'root'."""

    scope: str
    config: Path
    state: Path
    cache: Path
    runtime: Path
    engines: Path

    @property
    def vllmctl(self) -> str:
        """The operator's command for these places, for a shell."""
        return "vllmctl" + {"user": " --user", "root": f" --root {shlex.quote(str(self.config.parent))}"}.get(self.scope, "")

    @property
    def models(self) -> Path:
        return self.state / "models"

    def instance_config(self, name: str) -> Path:
        return self.config / f"{name}.yaml"

    def instance_state(self, name: str) -> Path:
        """launch.json, last.json, keys.json, incidents/, generations/: what must outlive the runtime directory."""
        return self.state / "instances" / name

    def instance_runtime(self, name: str) -> Path:
        """status.json, control.sock; systemd's RuntimeDirectory=vllmd/i/%i."""
        return self.runtime / "i" / name

    @property
    def sockets(self) -> Path:
        return self.runtime / "sock"

    @property
    def locks(self) -> Path:
        return self.runtime / "locks"

    @property
    def gpus(self) -> Path:
        """Leases; the quarantine is in state/gpus."""
        return self.runtime / "gpus"

    @property
    def gpu_socket(self) -> Path:
        """Where the host unit vllmd-gpu.service answers."""
        return self.runtime / "gpu.sock"


SYSTEM = Paths(
    scope="system",
    config=Path("/etc/vllmd"),
    state=Path("/var/lib/vllmd"),
    cache=Path("/var/cache/vllmd"),
    runtime=Path("/run/vllmd"),
    engines=Path("/opt/vllmd/engines"),
)


def _home(environ: Mapping[str, str]) -> Path:
    """$HOME, else what the user database says; cron and `env -i` leave it unset."""
    given = environ.get("HOME", "")
    if given.startswith("/"):
        return Path(given)
    try:
        return Path(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:
        return Path("/")


def user_paths(environ: dict[str, str] | os._Environ[str] = os.environ) -> Paths:
    home = _home(environ)

    def xdg(variable: str, default: Path) -> Path:
        given = environ.get(variable, "")
        return (Path(given) if given.startswith("/") else default) / "vllmd"  # the standard: a relative one is ignored

    state = xdg("XDG_STATE_HOME", home / ".local/state")
    return Paths(
        scope="user",
        config=xdg("XDG_CONFIG_HOME", home / ".config"),
        state=state,
        cache=xdg("XDG_CACHE_HOME", home / ".cache"),
        runtime=xdg("XDG_RUNTIME_DIR", state / "run"),
        engines=state / "engines",
    )


def root_paths(root: Path) -> Paths:
    root = root.absolute()
    return Paths(
        scope="root",
        config=root / "etc",
        state=root / "lib",
        cache=root / "cache",
        runtime=root / "run",
        engines=root / "engines",
    )
