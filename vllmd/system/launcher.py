"""Becomes the engine: enters its cgroup, makes a clean process of itself, waits for 'go', and executes.

Run as a program of its own (`python -I -S launcher.py FD`), standard library only, because nothing of this can be done
safely between fork and exec in a process that runs an event loop and threads. FD is a stream socket to the supervisor:
a line of JSON comes in (launcher specification, see process.py), "entered" goes out, one byte "go" comes in; it closes
by the exec itself, and before that it carries an error as a line of JSON. When the supervisor dies first, the socket
ends and so does this.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(link: int) -> int:
    text = read_line(link)
    if not text:
        return 1  # the supervisor is gone
    spec = json.loads(text)
    step = "cgroup", spec["cgroup"]
    try:
        enter_cgroup(spec["cgroup"])
        step = "session", ""
        clean_process(link, spec)
        step = "directory", spec["cwd"]
        os.chdir(spec["cwd"])
        os.write(link, b"entered\n")
        if os.read(link, 1) != b"g":
            return 1
        step = "exec", spec["argv"][0]
        os.execve(spec["argv"][0], spec["argv"], spec["env"])
    except OSError as error:
        os.write(link, json.dumps({"step": step[0], "path": step[1], "errno": error.errno}).encode() + b"\n")
        return 1


def read_line(link: int) -> bytes:
    """b'' when the other side is gone before the end of the line."""
    text = bytearray()
    while not text.endswith(b"\n"):
        piece = os.read(link, 65536)
        if not piece:
            return b""
        text += piece
    return bytes(text)


def enter_cgroup(directory: str) -> None:
    """First of all: from here on whatever this process becomes or starts is found and killed by its cgroup."""
    if directory:
        procs = os.open(directory + "/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(procs, b"0")
        finally:
            os.close(procs)


def clean_process(link: int, spec: dict[str, object]) -> None:
    """Nothing of the supervisor's (and of Python's own) signal dispositions, descriptors, session is left to the engine."""
    os.setsid()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)  # Python ignores SIGPIPE and SIGXFSZ, and ignoring outlives exec
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # who watches goes before who computes: system/priority
    os.umask(int(str(spec["umask"])))
    os.set_inheritable(link, False)  # noqa: FBT003
    close_others(link)
    if spec["oom_score_adj"] is not None:
        set_oom_score(str(spec["oom_score_adj"]))
    if spec["pdeathsig"]:
        die_with_parent(int(str(spec["parent"])))


def close_others(link: int) -> None:
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - pathlib costs 10 ms at start
        if int(name) > 2 and int(name) != link:
            with contextlib.suppress(OSError):  # the one that listed the directory
                os.close(int(name))


def set_oom_score(value: str) -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(value)  # lowering it needs a privilege: a wish, not a condition


def die_with_parent(parent: int) -> None:
    """For want of a cgroup. A parent that died before the call would not count: hence the second look."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
