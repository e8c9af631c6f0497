"""One way to fetch, in a process of its own: `python clients.py WAY ENDPOINT BUCKET PREFIX DIRECTORY`. Standard library, and what the
way itself needs: the environment that runs it is the peers', not the project's. TLS is checked against AWS_CA_BUNDLE.

    boto3 hub obstore obstore-sums      libraries
    threads splice                                what sockets alone can do: no listing, no retry, no verification
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import json
import os
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

THREADS = 8
PIECE = 1 << 20


def boto3(endpoint: str, bucket: str, prefix: str, target: Path) -> None:
    import boto3 as library
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = library.client("s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}, max_pool_connections=32))
    config = TransferConfig(max_concurrency=16, multipart_chunksize=16 << 20, preferred_transfer_client="classic")
    for item in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        client.download_file(bucket, item["Key"], str(target / Path(item["Key"]).name), Config=config)


def hub(endpoint: str, bucket: str, prefix: str, target: Path) -> None:  # noqa: ARG001 - the model has one name
    from huggingface_hub import snapshot_download

    snapshot_download("bench/model", endpoint=endpoint, local_dir=target, max_workers=THREADS, token=False)


def obstore(endpoint: str, bucket: str, prefix: str, target: Path, *, hashers: Callable[[], list[Any]] = list) -> None:
    """One stream a file, THREADS at once; the sums, if any, are made of what passes by."""
    library, stores = importlib.import_module("obstore"), importlib.import_module("obstore.store")
    options: dict[str, Any] = {"allow_http": True, "timeout": "600s"}
    store = stores.S3Store(bucket, endpoint=endpoint, region="us-east-1", virtual_hosted_style_request=False, client_options=options)
    keys = [item["path"] for page in library.list(store, prefix) for item in page]

    def fetch(key: str) -> None:
        sums = hashers()
        with (target / Path(key).name).open("wb", buffering=0) as file:
            for chunk in library.get(store, key).stream(min_chunk_size=PIECE):
                file.write(chunk)
                for each in sums:
                    each.update(chunk)

    _each(fetch, keys)


def obstore_sums(endpoint: str, bucket: str, prefix: str, target: Path) -> None:
    from blake3 import blake3

    obstore(endpoint, bucket, prefix, target, hashers=lambda: [hashlib.sha256(), blake3()])


@contextmanager
def _body(endpoint: str, path: str) -> Iterator[tuple[Any, int]]:
    """A socket from which so many bytes are to be read: its headers are read byte by byte, so that nothing is taken too much."""
    parts = urlsplit(endpoint)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ["AWS_CA_BUNDLE"])
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=context)
    connection.request("GET", path)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.sock.recv(1)
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    try:
        yield connection.sock, int(lengths[0].split(b":")[1])
    finally:
        connection.close()


def threads(endpoint: str, bucket: str, prefix: str, target: Path) -> None:
    def fetch(name: str) -> None:
        buffer = memoryview(bytearray(PIECE))
        fd = os.open(target / name, os.O_WRONLY | os.O_CREAT)
        with _body(endpoint, f"/{bucket}/{prefix}{name}") as (link, size):
            offset = 0
            while offset < size:
                count = link.recv_into(buffer)
                offset += os.pwrite(fd, buffer[:count], offset)
        os.close(fd)

    _each(fetch, _names(endpoint))


def splice(endpoint: str, bucket: str, prefix: str, target: Path) -> None:
    """Socket -> pipe -> file: the bytes do not come into this process at all. Not over TLS."""
    import fcntl

    def fetch(name: str) -> None:
        fd = os.open(target / name, os.O_WRONLY | os.O_CREAT)
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIECE)
        with _body(endpoint, f"/{bucket}/{prefix}{name}") as (link, size):
            offset = 0
            while offset < size:
                there = os.splice(link.fileno(), writer, min(PIECE, size - offset))
                while there:
                    moved = os.splice(reader, fd, there, offset_dst=offset)
                    there, offset = there - moved, offset + moved
        for each in (fd, reader, writer):
            os.close(each)

    _each(fetch, _names(endpoint))


def _names(endpoint: str) -> list[str]:
    context = ssl.create_default_context(cafile=os.environ["AWS_CA_BUNDLE"]) if endpoint.startswith("https") else None
    with urlopen(f"{endpoint}/api/models/bench/model", context=context) as answer:
        return [item["rfilename"] for item in json.load(answer)["siblings"]]


def _each(work: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, names))


WAYS: dict[str, Callable[[str, str, str, Path], None]] = {
    "boto3": boto3,
    "hub": hub,
    "obstore": obstore,
    "obstore-sums": obstore_sums,
    "threads": threads,
    "splice": splice,
}

if __name__ == "__main__":
    threading.stack_size(1 << 20)
    way, endpoint, bucket, prefix, directory = sys.argv[1:]
    WAYS[way](endpoint, bucket, prefix, Path(directory))
