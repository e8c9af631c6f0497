"""Environment files: the hand-over between vllm-resolve-model and vllm-serve, read by a grammar and not by a shell.

    line    = blank | "#" anything | ["export "] KEY "=" value
    value   = 'literal' | "text with \\n \\t \\" \\\\, any other \\x is x" | one plain word; then blanks, then maybe "# comment"

Nothing is interpolated: $NAME stays as it is. What a shell would execute or compute (`$(`, a backtick, `${`) is refused
where a shell would do so, with line and column, because a person who wrote it expects something that will not happen.
No value spans lines. `render` and `parse` are exact inverses for every text without NUL, and what `render` writes is read the same by a
shell, line breaks and tabs beside a single quote aside (a shell has no escape for them inside double quotes).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vllmd.errors import ConfigError, PermissionMissing, VllmdError

MAX_BYTES = 1 << 20
TRUSTED_TIMEOUT_S = 10.0

_ASSIGNMENT = re.compile(r"[ \t]*(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=", re.ASCII)
_SKIP = re.compile(r"[ \t\r]*(#.*)?", re.DOTALL)
_SHELL_MEANS_MORE = re.compile(r"\$\(|\$\{|`")
_PLAIN_WORD = re.compile(r"[^ \t\r'\"\\;&|<>()]*")
_ESCAPES = {"n": "\n", "t": "\t"}
_SHELL_OWN = frozenset({"_", "SHLVL", "PWD", "OLDPWD"})


def _everything(_key: str) -> bool:
    return True


def _bad(where: str, line: int, column: int, reason: str) -> ConfigError:
    hint = "write KEY='value' on one line, with single quotes around anything but a plain word"
    return ConfigError("env_file_invalid", f"{where}:{line}:{column}: {reason}", hint)


class _Line:
    """One line being read; columns count from 1."""

    def __init__(self, text: str, where: str, number: int) -> None:
        self.text = text
        self.where = where
        self.number = number

    def bad(self, at: int, reason: str) -> ConfigError:
        return _bad(self.where, self.number, at + 1, reason)

    def refuse_shell(self, start: int, end: int) -> None:
        found = _SHELL_MEANS_MORE.search(self.text, start, end)
        if found:
            raise self.bad(found.start(), f"{found[0]!r} is not interpreted here; put it in single quotes if it is meant literally")

    def assignment(self) -> tuple[str, str]:
        match = _ASSIGNMENT.match(self.text)
        if not match:
            raise self.bad(len(self.text) - len(self.text.lstrip(" \t")), "expected KEY=VALUE, a comment or an empty line")
        quote = self.text[match.end() : match.end() + 1]
        read = {"'": self._single, '"': self._double}.get(quote, self._word)
        value, end = read(match.end())
        if not _SKIP.fullmatch(self.text, end) or (self.text[end : end + 1] == "#"):
            raise self.bad(end, "only blanks or ' # comment' may follow the value")
        return match[1], value

    def _single(self, start: int) -> tuple[str, int]:
        end = self.text.find("'", start + 1)
        if end < 0:
            raise self.bad(start, "the single quote is not closed on this line")
        return self.text[start + 1 : end], end + 1

    def _double(self, start: int) -> tuple[str, int]:
        out: list[str] = []
        at = start + 1
        while at < len(self.text):
            char = self.text[at]
            if char == '"':
                return "".join(out), at + 1
            if char == "\\":
                at += 1
                escaped = self.text[at : at + 1]
                out.append(_ESCAPES.get(escaped, escaped))
            else:
                self.refuse_shell(at, at + 2)
                out.append(char)
            at += 1
        raise self.bad(start, "the double quote is not closed on this line")

    def _word(self, start: int) -> tuple[str, int]:
        match = _PLAIN_WORD.match(self.text, start)
        assert match
        self.refuse_shell(start, min(match.end() + 1, len(self.text)))
        following = self.text[match.end() : match.end() + 1]
        if following and following not in " \t\r":
            raise self.bad(match.end(), f"{following!r} cannot stand in an unquoted value; quote the whole value")
        return match[0], match.end()


def parse(text: str, where: str, *, allow: Callable[[str], bool] = _everything) -> dict[str, str]:
    """The variables that a file sets; a later line wins. Keys that `allow` refuses are left out.

    `where` names the text in errors. ConfigError (env_file_invalid) with line and column on anything else.
    """
    if "\0" in text:
        raise _bad(where, text.count("\n", 0, text.index("\0")) + 1, 1, "contains a NUL character")
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not _SKIP.fullmatch(line):
            key, value = _Line(line, where, number).assignment()
            if allow(key):
                found[key] = value
    return found


def _quoted(value: str) -> str:
    if "'" not in value and "\n" not in value:
        return f"'{value}'"
    escaped = re.sub(r'[\\"$`]', r"\\\g<0>", value)
    return '"' + escaped.replace("\n", "\\n").replace("\t", "\\t") + '"'


def render(mapping: Mapping[str, str], comment: str = "") -> str:
    """The text of a file that sets these variables. ValueError on a key or value that no environment can hold."""
    lines = [f"# {line}" for line in re.split(r"[\r\n]+", comment) if line]
    for key, value in mapping.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key, re.ASCII) or "\0" in value:
            raise ValueError(f"cannot be an environment variable: {key!r}={value!r}")
        lines.append(f"export {key}={_quoted(value)}")
    return "\n".join(lines) + "\n"


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file descriptor of a regular file that is no link, and not too large."""
    try:
        # O_NONBLOCK: opening a FIFO that somebody put there must not block.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("env_file_invalid", f"{path} is not a regular file", "remove it and resolve the model again")
        if status.st_size > MAX_BYTES:
            raise ConfigError("env_file_invalid", f"{path} is larger than {MAX_BYTES} bytes", "remove it and resolve the model again")
        yield fd
    finally:
        os.close(fd)


def _unreadable(path: Path, error: OSError) -> VllmdError:
    if isinstance(error, FileNotFoundError):
        return ConfigError("env_file_missing", f"{path} does not exist", "run vllm-resolve-model first")
    if isinstance(error, PermissionError):
        return PermissionMissing("env_file_unreadable", f"{path}: {error.strerror}", "run as the user who resolved the model")
    reason = "is a symbolic link" if path.is_symlink() else error.strerror
    return ConfigError("env_file_invalid", f"{path}: {reason}", "remove it and resolve the model again")


def read(path: Path, *, allow: Callable[[str], bool] = _everything) -> dict[str, str]:
    """Parse the file at `path`. ConfigError: env_file_missing, env_file_invalid; PermissionMissing: env_file_unreadable."""
    with _opened(path) as fd:
        data = os.pread(fd, MAX_BYTES + 1, 0)
    if len(data) > MAX_BYTES:
        raise ConfigError("env_file_invalid", f"{path} is larger than {MAX_BYTES} bytes", "remove it and resolve the model again")
    return parse(data.decode("utf-8", "surrogateescape"), str(path), allow=allow)


def write(path: Path, mapping: Mapping[str, str], comment: str = "") -> None:
    """Replace the file at `path` by one of mode 0600, atomically; a reader sees the old text or the new one."""
    data = render(mapping, comment).encode("utf-8", "surrogateescape")
    import tempfile  # brings random and hashlib, which nobody else needs so early

    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_trusted(
    path: Path, *, environ: Mapping[str, str] | None = None, allow: Callable[[str], bool] = _everything
) -> dict[str, str]:
    """What a shell that sources the file has set. The only place where vllmd lets a shell run a file, and only on request
    (VLLM_ENV_FILE_TRUSTED): it must belong to root or to the caller, and nobody else may be able to write it.

    `environ` is what the file may refer to (os.environ by default). ConfigError: env_file_untrusted, env_file_failed, and those of `read`.
    """
    known = {k: v for k, v in (os.environ if environ is None else environ).items() if not k.startswith("_VLLM_")}
    with _opened(path) as fd:
        status = os.fstat(fd)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            what = f"{path} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}: not trusted"
            raise ConfigError("env_file_untrusted", what, f"chown root {path} && chmod 0600 {path}, or unset VLLM_ENV_FILE_TRUSTED")
        output = _sourced(fd, path, known)
    pairs = (item.split("=", 1) for item in output.decode("utf-8", "surrogateescape").split("\0") if "=" in item)
    return {k: v for k, v in pairs if known.get(k) != v and k not in _SHELL_OWN and allow(k)}


def _sourced(fd: int, path: Path, environ: Mapping[str, str]) -> bytes:
    """Source the open file (the one that was checked, not what now has its name) and return `env -0`."""
    import signal
    import subprocess

    # Memory files and not pipes: a process that the file leaves behind would keep a pipe open, and us waiting.
    output = os.memfd_create("environment")
    errors = os.memfd_create("errors")
    script = 'set -a; . "$1" || exit; env -0 >"$2"'
    argv = ["/bin/sh", "-c", script, "sh", f"/dev/fd/{fd}", f"/dev/fd/{output}"]
    try:
        child = subprocess.Popen(
            argv, env=dict(environ), pass_fds=(fd, output), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
        )
        try:
            code = child.wait(TRUSTED_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
        if code != 0:
            said = os.pread(errors, 400, 0).decode("utf-8", "replace").strip().replace("\n", "; ")
            reason = f"no end within {TRUSTED_TIMEOUT_S:g} s" if code == -signal.SIGKILL else said or f"the shell exits with {code}"
            raise ConfigError("env_file_failed", f"{path}: {reason}", f"try it by hand: sh -c '. {path}'")
        return os.pread(output, MAX_BYTES * 4, 0)
    finally:
        os.close(output)
        os.close(errors)
