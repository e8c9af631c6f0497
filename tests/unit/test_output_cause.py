"""Which of an engine's last lines is quoted as the reason of its end."""

from __future__ import annotations

from typing import Any

import pytest

from vllmd.engines.protocol import LogFact
from vllmd.instance.output import Output

pytestmark = pytest.mark.unit

WARNING = "(EngineCore pid=7) WARNING 11-21 09:47:12 [system_utils.py:319] Found ulimit of 20000 and failed to automatically increase. This can cause fd limit errors like `OSError: [Errno 24] Too many open files`."
ERROR = "(EngineCore pid=7) ERROR 11-21 09:47:13 [core.py:1512] ValueError: no room for the KV cache"
ECHO = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


class Deaf:
    def __getattr__(self, _name: str) -> Any:
        return lambda *_a, **_k: LogFact(6)


def cause(*lines: str) -> str:
    output = Output(Deaf(), Deaf(), str, lambda _fact: None)  # type: ignore[arg-type]
    for line in lines:
        output.line(line)
    return output.cause()


def test_a_warning_that_speaks_of_an_error_is_none() -> None:
    """vLLM warns of this at every start where the limit of descriptors is low; a SIGKILL was put down to it."""
    assert cause(WARNING) == ""


def test_the_error_above_its_echo_is_the_cause() -> None:
    assert cause(ERROR, WARNING, ECHO) == "ValueError: no room for the KV cache"
