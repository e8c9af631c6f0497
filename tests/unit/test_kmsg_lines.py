"""The kernel's lines about GPUs, as drivers of several generations write them."""

from __future__ import annotations

import pytest

from vllmd.gpu.kmsg import Line, parse

pytestmark = pytest.mark.unit

HERE = "0000:10:00.0"


@pytest.mark.parametrize(("text", "line"), [
    ("NVRM: Xid (PCI:0000:10:00): 79, pid=1234, name=python3, GPU has fallen off the bus.", Line(HERE, 79, 1234, "python3", "GPU has fallen off the bus.")),
    ("NVRM: Xid (PCI:0000:10:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", Line(HERE, 79, 0, "", "GPU has fallen off the bus.")),
    ("NVRM: Xid (PCI:0000:10:00): 31, pid=44, name=VLLM::Worker, Ch 00000008, intr 10000000. MMU Fault", Line(HERE, 31, 44, "VLLM::Worker", "Ch 00000008, intr 10000000. MMU Fault")),
    ("NVRM: Xid (PCI:0000:10:00): 13, pid='987', name=python, Graphics Exception", Line(HERE, 13, 987, "python", "Graphics Exception")),
    ("NVRM: Xid (0000:10:00): 6, PE0001", Line(HERE, 6, detail="PE0001")),
    ("NVRM: Xid (PCI:0000:10:00): 45", Line(HERE, 45)),
    ("NVRM: Xid (PCI:0000:10:00): 145, NVLINK: RLW Fatal, Link 05", Line(HERE, 145, detail="NVLINK: RLW Fatal, Link 05")),
    ("NVRM: Xid (PCI:0000:10:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)",
     Line(HERE, 154, detail="GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)", action=2)),
    ("NVRM: The NVIDIA GPU 0000:10:00.0 (PCI ID: 10de:2330) installed in this system has fallen off the bus and is not responding to commands.",
     Line(HERE, 79, detail="the kernel's line has no Xid")),
    ("NVRM: GPU 0000:10:00.0: GPU has fallen off the bus.", Line(HERE, 79, detail="the kernel's line has no Xid")),
    ("NVRM: GPU at PCI:0000:10:00: GPU-b850f46d-d5ea-c752-ddf3-c07454c2d4ba", Line(HERE, uuid="GPU-b850f46d-d5ea-c752-ddf3-c07454c2d4ba")),
    ("NVRM: Xid (PCI:00010000:10:00): 48, pid=1", Line("10000:10:00.0", 48, 1)),
])  # fmt: skip
def test_a_line_is_read(text: str, line: Line) -> None:
    assert parse(text) == line


@pytest.mark.parametrize("text", [
    "", "NVRM: loading NVIDIA UNIX x86_64 Kernel Module", "NVRM: Xid (PCI:0000:10:00): 0, nothing", "Xid (PCI:0000:10:00): 79", "usb 1-1: name=NVRM: Xid (PCI:0000:10:00): 79",
    "NVRM: Xid (PCI:0000:10:00): x", "NVRM: Xid (PCI:../../..:00): 79" + "9" * 40, "NVRM: GPU at PCI:0000:10:00: GPU-../../../etc/passwd",
])  # fmt: skip
def test_other_lines_are_not(text: str) -> None:
    assert parse(text) is None


def test_a_process_cannot_forge_fields_by_its_name() -> None:
    line = parse("NVRM: Xid (PCI:0000:10:00): 13, pid=5, name=a, pid=1, name=b, rest")
    assert line is not None
    assert (line.pid, line.process) == (5, "a")


def test_what_is_not_printable_is_replaced_and_length_is_bounded() -> None:
    line = parse("NVRM: Xid (PCI:0000:10:00): 13, pid=99999999999, name=\x1b[31m" + "x" * 4000)
    assert line is not None
    assert line.process.isprintable()
    assert len(line.process) <= 64
    assert len(line.detail) <= 160
