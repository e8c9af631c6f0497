"""Reading an engine's output from real pipes: floods, progress bars, endless lines, broken UTF-8."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vllmd.system.lines import LineLimits, LineReader, TokenBucket

pytestmark = pytest.mark.component


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


class Output:
    """A pipe with a LineReader, and what came."""

    def __init__(self, limits: LineLimits) -> None:
        self.lines: list[str] = []
        self.dropped: list[int] = []
        self.closes = 0
        read, self.write_fd = os.pipe()
        self.reader = LineReader(read, self.lines.append, limits=limits, on_dropped=self.dropped.append, on_close=self.on_close)

    def on_close(self) -> None:
        self.closes += 1

    def write(self, data: bytes) -> None:
        os.write(self.write_fd, data)

    async def finish(self) -> list[str]:
        self.hang_up()
        await until(lambda: self.reader.closed)
        assert self.closes == 1
        return self.lines

    def hang_up(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1


USUAL = LineLimits()


def run(scenario: Callable[[Output], Awaitable[None]], limits: LineLimits = USUAL) -> Output:
    async def main() -> Output:
        output = Output(limits)
        try:
            await scenario(output)
        finally:
            output.hang_up()
            output.reader.close()
        return output

    return asyncio.run(main())


def test_lines_end_by_newline_carriage_return_or_the_end() -> None:
    async def scenario(output: Output) -> None:
        output.write(b"one\ntwo\r\n\n\nthree\rfo")
        output.write(b"ur\nlast")
        assert await output.finish() == ["one", "two", "three", "four", "last"]

    run(scenario)


def test_broken_utf8_is_replaced_and_a_character_cut_by_two_writes_is_not_damaged() -> None:
    async def scenario(output: Output) -> None:
        output.write(b"bad \xff\xfe\n\xc3")
        await until(lambda: len(output.lines) == 1)
        output.write(b"\xa9\n")
        assert await output.finish() == ["bad \ufffd\ufffd", "é"]

    run(scenario)


def test_a_line_that_never_ends_is_cut_and_says_how_much() -> None:
    async def scenario(output: Output) -> None:
        for _ in range(100):
            output.write(b"x" * 10_000)
            await asyncio.sleep(0)
        output.write(b"\nnext\n")
        assert await output.finish() == ["x" * 1000 + " [999000 bytes cut]", "next"]

    run(scenario, LineLimits(line_max_bytes=1000))


def test_a_progress_bar_shows_before_its_next_step() -> None:
    async def scenario(output: Output) -> None:
        output.write(b"\rLoading:  10%")
        await until(lambda: output.lines == ["Loading:  10%"])
        output.write(b"\rLoading:  20%\r")
        await until(lambda: output.lines[1:] == ["Loading:  20%"])

    run(scenario)


def test_a_line_written_in_two_halves_stays_one() -> None:
    async def scenario(output: Output) -> None:
        output.write(b"first\nsec")
        await asyncio.sleep(0.5)  # longer than a progress bar needs to settle
        output.write(b"ond\n")
        assert await output.finish() == ["first", "second"]

    run(scenario)


def test_more_lines_than_the_rate_are_counted_and_every_line_is_accounted_for() -> None:
    async def scenario(output: Output) -> None:
        for start in range(0, 20_000, 1000):
            output.write(b"".join(b"%d\n" % number for number in range(start, start + 1000)))
            await asyncio.sleep(0.002)
        await until(lambda: sum(output.dropped) > 0, 3)
        await output.finish()

    output = run(scenario, LineLimits(lines_per_s=100))
    assert output.lines[:100] == [str(number) for number in range(100)]
    assert 100 <= len(output.lines) < 1000
    assert len(output.lines) + output.reader.dropped == 20_000
    assert sum(output.dropped) == output.reader.dropped


def test_a_burst_within_the_rate_loses_nothing() -> None:
    async def scenario(output: Output) -> None:
        output.write(b"".join(b"%d\n" % number for number in range(900)))
        assert await output.finish() == [str(number) for number in range(900)]

    assert run(scenario).reader.dropped == 0


def test_close_takes_what_is_there_although_a_writer_is_left() -> None:
    async def scenario(output: Output) -> None:
        output.write(b"".join(b"%d\n" % number for number in range(500)) + b"last words")
        output.reader.close()
        output.reader.close()
        assert output.closes == 1
        assert output.lines == [*(str(number) for number in range(500)), "last words"]

    run(scenario)


FLOOD = """
import os
block = (b"x" * 79 + b"\\n") * 800
while True:
    os.write(1, block)
"""


def test_a_flood_neither_blocks_the_loop_nor_the_engine() -> None:
    """At more than 100 MB/s the loop's latency stays under 50 ms; the writer is never blocked for long."""

    async def main() -> tuple[float, float, int]:
        with subprocess.Popen([sys.executable, "-I", "-S", "-c", FLOOD], stdout=subprocess.PIPE) as writer:
            try:
                assert writer.stdout is not None
                lines: list[str] = []
                reader = LineReader(os.dup(writer.stdout.fileno()), lines.append)
                worst, started = 0.0, time.monotonic()
                while (now := time.monotonic()) < started + 1.5:
                    await asyncio.sleep(0.005)
                    worst = max(worst, time.monotonic() - now - 0.005)
                written = int(next(x for x in Path(f"/proc/{writer.pid}/io").read_text().split("\n") if x.startswith("wchar")).split()[1])
                reader.close()
                assert len(lines) <= 3500
                return worst, written / 1.5e6, reader.dropped
            finally:
                writer.kill()

    worst, rate, dropped = asyncio.run(main())
    assert worst < 0.05
    assert rate > 50
    assert dropped > 10_000


def test_a_token_bucket_saves_up_for_one_second_only() -> None:
    now = 0.0
    bucket = TokenBucket(10, clock=lambda: now)
    assert bucket.take(100) == 10
    assert bucket.take(1) == 0
    now = 0.25
    assert bucket.take(100) == 2
    now = 100.0
    assert bucket.take(100) == 10
