"""A process that holds a port in one of the ways that preflight must tell apart. Says on stdout, as a line of JSON, when
it does, with the pids of its children. Words after `--` only stand on its command line.

    listener.py HOST PORT [--bound] [--reuse addr|port] [--v6only] [--uid N] [--ignore-term] [--successor] [--child KIND]... [-- vllm serve m]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time

REUSE = {"addr": socket.SO_REUSEADDR, "port": socket.SO_REUSEPORT}


def options() -> argparse.Namespace:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--bound", action="store_true")
    parser.add_argument("--reuse", choices=sorted(REUSE), default="")
    parser.add_argument("--v6only", action="store_true")
    parser.add_argument("--uid", type=int, default=0)
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--successor", action="store_true", help="at SIGTERM another takes the port, out of the tree")
    parser.add_argument("--child", action="append", default=[], choices=["stubborn", "zombie", "double-fork"])
    return parser.parse_args(own)


def hold(host: str, port: int, asked: argparse.Namespace) -> socket.socket:
    family = socket.AF_UNIX if "/" in host else socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    if asked.reuse:
        held.setsockopt(socket.SOL_SOCKET, REUSE[asked.reuse], 1)
    if asked.v6only:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    held.bind(host if family == socket.AF_UNIX else (host, port))
    if not asked.bound:
        held.listen()
    return held


def wait_forever() -> None:
    while True:
        time.sleep(60)


def fork(kind: str) -> int:
    """The pid of the child, or for double-fork that of the grandchild, which leaves the tree and the session."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if kind == "double-fork":
            os.setsid()
            if os.fork():
                os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(writer, f"{os.getpid()}".encode())
        if kind == "zombie":
            os._exit(0)
        wait_forever()
    os.close(writer)
    child = int(os.read(reader, 32))
    if kind == "double-fork":
        os.waitpid(pid, 0)
    os.close(reader)
    return child


def hand_over(asked: argparse.Namespace) -> None:
    """Returns once the successor has the port too."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.dup2(writer, 1)
        os.execv(sys.executable, [sys.executable, __file__, asked.host, str(asked.port), "--reuse", "port"])
    os.fdopen(reader).readline()  # the whole line: it may come in two writes
    os._exit(0)


def main() -> None:
    asked = options()
    if asked.successor:
        signal.signal(signal.SIGTERM, lambda *_: hand_over(asked))
    if asked.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    children = [fork(kind) for kind in asked.child]
    if asked.uid:
        os.setgroups([])
        os.setresgid(asked.uid, asked.uid, asked.uid)
        os.setresuid(asked.uid, asked.uid, asked.uid)
    held = hold(asked.host, asked.port, asked)
    print(json.dumps({"pid": os.getpid(), "children": children}), flush=True)
    with held:
        wait_forever()


if __name__ == "__main__":
    main()
