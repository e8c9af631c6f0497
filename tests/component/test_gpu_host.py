"""The host's GPU watch as a real process: the real NVML binding above the stub of the driver, and a pipe as the kernel's log."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests import procs, promtool
from tests.fakes.nvml import pci, uuid
from tests.gpu_service import GpuService
from vllmd.core import xids
from vllmd.gpu import quarantine
from vllmd.gpu.quarantine import Record
from vllmd.system.host import private_memory_bytes

pytestmark = pytest.mark.component


def has_gpus(document: dict[str, Any]) -> bool:
    return bool(document["gpus"])


def quarantined(service: GpuService) -> dict[str, Record]:
    return quarantine.read(service.paths)


def test_the_figures_are_a_textfile_too_and_show_the_quarantine_without_an_instance(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    with GpuService(2, env={"VLLMD_METRICS_TEXTFILE": str(folder), "VLLMD_METRICS_INTERVAL_S": "0.1"}) as service:
        service.listen().snapshot(has_gpus)
        service.log.xid(79, 1)
        [file] = procs.wait_until("the file", lambda: list(folder.glob("*.prom")) if folder.exists() else [])
        row = f'vllmd_gpu_watch_quarantined{{gpu="{uuid(1)}",class="reboot"}} 1'
        procs.wait_until("the quarantine in it", lambda: row in file.read_text().splitlines())
        assert promtool.run("check", "metrics", stdin=file.read_text()).stdout == ""
        service.stop()
        assert list(folder.iterdir()) == []


def test_the_document_is_what_the_driver_says() -> None:
    with GpuService(2) as service:
        me = os.getpid()
        service.stub.gpu(1, temperature=77, clocks=0x48, ecc="3 1", remapped="1 2 1 0", field_38=9, pcie="1 8 5 16", fabric="2 0")
        service.stub.processes(1, (me, 500))
        service.stub.slices(0, ("MIG-5c0f8a77-1111-2222-3333-444455556666", 9856, 9000))
        document = service.listen().snapshot(lambda found: has_gpus(found) and bool(found["gpus"][1]["processes"]) and bool(found["gpus"][0]["mig"]))
        assert (document["schema"], document["source"], document["driver_version"], document["stuck_in"]) == (1, "nvml", "570.86.15", "")
        one, two = document["gpus"]
        assert one.items() >= {
            "index": 0, "uuid": uuid(0), "pci": f"{pci(0)}.0", "name": "NVIDIA H100 80GB HBM3", "memory_total_mib": 81559, "memory_free_mib": 80000,
            "memory_used_mib": 1059, "temperature_c": 41, "utilization_pct": 3, "power_w": 71.0, "clock_reasons": [], "ecc": {"corrected": 0, "uncorrected": 0},
            "remapped": {"correctable": 0, "uncorrectable": 0, "pending": False, "failed": False}, "nvlink": {"crc_errors": 0}, "fabric": "completed",
            "pcie": {"gen": 5, "width": 16, "max_gen": 5, "max_width": 16}, "recovery_action": 0, "lost": "", "compute_capability": "9.0", "processes": [],
            "mig": [{"uuid": "MIG-5c0f8a77-1111-2222-3333-444455556666", "memory_total_mib": 9856, "memory_free_mib": 9000}], "quarantine": None,
            "verdict": {"class": "ok", "what": "", "hint": ""},
        }.items()  # fmt: skip
        assert (two["temperature_c"], two["ecc"], two["remapped"]["pending"], two["nvlink"], two["fabric"]) == (77, {"corrected": 3, "uncorrected": 1}, True, {"crc_errors": 9}, "in progress")
        assert two["clock_reasons"] == ["hardware_slowdown", "hardware_thermal"]
        assert [(each["pid"], each["used_mib"], isinstance(each["unit"], str)) for each in two["processes"]] == [(me, 500, True)]
        assert two["verdict"]["class"] == "warn"
        assert service.status()["gpus"][1]["uuid"] == uuid(1)


def test_figures_that_a_card_does_not_have_are_left_out() -> None:
    with GpuService(start=False) as service:
        service.stub.gpus[0] = {"uuid": uuid(0), "name": "GeForce"}
        service.stub.write()
        service.start()
        [gpu] = service.listen().snapshot(has_gpus)["gpus"]
        assert (gpu["name"], gpu["ecc"], gpu["nvlink"], gpu["pcie"], gpu["fabric"], gpu["lost"]) == ("GeForce", {}, {}, {}, "", "")
        assert "memory_total_mib" not in gpu
        assert gpu["verdict"]["class"] == "ok"
        assert service.listen().findings == []


class TestXids:
    @pytest.mark.parametrize("number", sorted({min(number for number, row in xids.TABLE.items() if row.cls == cls) for cls in xids.CLASSES}))
    def test_each_class_is_told_and_only_what_needs_it_quarantined(self, number: int) -> None:
        row = xids.of(number)
        with GpuService(2) as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.xid(number, 1, pid=77)
            _, finding = listener.finding(xid=number)
            assert (finding["uuid"], finding["pci"], finding["cls"], finding["pid"], finding["process"]) == (uuid(1), f"{pci(1)}.0", row.cls, 77, "python3")
            if row.cls in ("reset", "reboot", "replace"):
                [record] = procs.wait_until("the quarantine", lambda: quarantined(service)).values()
                assert (record.uuid, record.cls, record.xid, record.hint) == (uuid(1), row.cls, number, row.hint)
                document = listener.snapshot(lambda found: found["gpus"][1]["quarantine"] is not None)
                assert document["gpus"][1]["verdict"]["class"] == row.cls
                assert document["gpus"][0]["quarantine"] is None
            else:
                service.log.xid(64, 0)  # what comes after it has been written, so that it would have been
                procs.wait_until("the quarantine of the other", lambda: uuid(0) in quarantined(service))
                assert set(quarantined(service)) == {uuid(0)}

    def test_the_kernel_s_line_and_nvml_s_event_are_one(self) -> None:
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.stub.event(31)
            listener.finding(xid=31, pid=0)
            service.log.xid(31, pid=99)
            listener.finding(xid=31, pid=99)
            service.stub.event(31)
            service.log.xid(31, pid=99)
            service.log.xid(45)
            listener.finding(xid=45)
            assert [finding["xid"] for _, finding in listener.findings] == [31, 31, 45]
            procs.wait_until("NVML's second event", lambda: b"repeated_total 2" in service.ask("/metrics"))

    def test_nvml_s_event_alone_is_enough(self) -> None:
        with GpuService(2, kmsg="/nowhere/kmsg") as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            procs.wait_until("the reader of events", lambda: service.sampler())
            service.stub.event(79, 1)
            _, finding = listener.finding(xid=79)
            assert (finding["uuid"], finding["detector"], finding["cls"]) == (uuid(1), "gpu_lost", "reboot")
            procs.wait_until("the quarantine", lambda: uuid(1) in quarantined(service))
            assert "Xids come from NVML's events alone" in service.said()
            assert "/nowhere/kmsg" in service.status()["kernel_log"]

    def test_a_gpu_that_fell_off_the_bus_without_an_xid(self) -> None:
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.say(f"NVRM: GPU {pci(0)}.0: GPU has fallen off the bus.")
            assert listener.finding(xid=79)[1]["uuid"] == uuid(0)

    def test_lines_of_user_space_are_not_the_kernel_s(self) -> None:
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.say(f"NVRM: Xid (PCI:{pci(0)}): 79, forged", facility=1)
            service.log.xid(45)
            listener.finding(xid=45)
            assert [finding["xid"] for _, finding in listener.findings] == [45]

    def test_what_came_before_the_start_counts_if_it_still_matters(self) -> None:
        with GpuService(2, start=False) as service:
            service.log.xid(31, 0, pid=5, at=time.monotonic() - 600)
            service.log.xid(48, 1, at=time.monotonic() - 600)
            service.start()
            procs.wait_until("the quarantine", lambda: uuid(1) in quarantined(service))
            assert set(quarantined(service)) == {uuid(1)}
            record = quarantined(service)[uuid(1)]
            assert abs(record.first_at - (time.time() - 600)) < 30

    def test_what_was_told_is_not_told_again_by_the_next_service(self) -> None:
        """A GPU is reset with the service stopped, and cleared: its old line in the kernel's log must not quarantine it again."""
        with GpuService() as service:
            service.log.xid(48)
            procs.wait_until("the quarantine", lambda: quarantined(service))
            assert service.stop() == 0
            quarantine.clear(service.paths, uuid(0))
            service.log.replay()
            service.start()
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.xid(45)
            listener.finding(xid=45)
            assert [finding["xid"] for _, finding in listener.findings] == [45]
            assert quarantined(service) == {}


class TestTheDriversOwnVerdict:
    def test_it_quarantines_and_a_reset_lifts_it(self) -> None:
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.stub.gpu(field_230=1)
            _, finding = listener.finding(detector="gpu_xid")
            assert (finding["cls"], finding["fatal"]) == ("reset", True)
            record = procs.wait_until("the quarantine", lambda: quarantined(service))[uuid(0)]
            assert record.driver == 1
            service.stub.gpu(field_230=0)
            procs.wait_until("the release", lambda: not quarantined(service))
            procs.wait_until("the word of it", lambda: "may be used again" in service.said())

    def test_an_xid_makes_the_driver_be_asked_at_once(self) -> None:
        with GpuService(interval_s=30) as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.stub.gpu(field_230=2)
            at = time.monotonic()
            service.log.xid(154)
            told, finding = listener.finding(cls="reboot")
            assert (finding["xid"], finding["uuid"]) == (0, uuid(0))
            assert told - at < 5

    def test_xid_154_says_it_itself(self) -> None:
        with GpuService(interval_s=30) as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.stub.set(hang="nvmlDeviceGetMemoryInfo")  # the driver says nothing more
            service.log.xid(154, rest="GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)")
            listener.finding(cls="reset")
            assert procs.wait_until("the quarantine", lambda: quarantined(service))[uuid(0)].driver == 1

    def test_a_quarantine_by_an_xid_is_not_lifted_by_silence(self) -> None:
        with GpuService() as service:
            service.log.xid(48)
            procs.wait_until("the quarantine", lambda: quarantined(service))
            seen = len(service.listen().snapshots)
            listener = service.listen()
            procs.wait_until("ten snapshots more", lambda: len(listener.snapshots) > seen + 10)
            assert uuid(0) in quarantined(service)


@pytest.mark.parametrize(("change", "lost", "cls"), [({"fails": 15}, "lost", "reboot"), ({"fails": 16}, "reset_required", "reset")])
def test_a_gpu_that_answers_no_more(change: dict[str, Any], lost: str, cls: str) -> None:
    with GpuService(2) as service:
        listener = service.listen()
        listener.snapshot(has_gpus)
        service.stub.gpu(1, **change)
        _, finding = listener.finding(detector="gpu_lost")
        assert (finding["uuid"], finding["cls"], finding["fatal"]) == (uuid(1), cls, True)
        document = listener.snapshot(lambda found: found["gpus"][1]["lost"] == lost)
        assert document["gpus"][0]["lost"] == ""
        assert "memory_free_mib" in document["gpus"][0]
        assert procs.wait_until("the quarantine", lambda: quarantined(service))[uuid(1)].cls == cls


def test_ecc_and_remap_growth() -> None:
    with GpuService() as service:
        listener = service.listen()
        listener.snapshot(has_gpus)
        service.stub.gpu(ecc="5 2")
        assert listener.finding(detector="gpu_ecc")[1]["cls"] == "warn"
        service.stub.gpu(remapped="0 511 0 0")
        service.stub.gpu(remapped="0 512 0 0")
        assert "512 rows" in listener.finding(detector="gpu_remap")[1]["what"]
        assert quarantined(service) == {}
        service.stub.gpu(remapped="0 512 1 1")
        listener.finding(detector="gpu_remap", cls="replace")
        procs.wait_until("the quarantine", lambda: quarantined(service).get(uuid(0)))


class TestADriverThatHangs:
    def test_the_call_is_named_within_the_setting(self) -> None:
        with GpuService(call_timeout_s=1.0) as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            first = service.sampler().pid
            service.stub.set(hang="nvmlDeviceGetTemperature")
            at = time.monotonic()
            told, finding = listener.finding(detector="gpu_stuck")
            assert 0.9 < told - at < 2.0
            assert f"nvmlDeviceGetTemperature {uuid(0)}" in finding["what"]
            document = listener.snapshot(lambda found: bool(found["stuck_in"]))
            assert document["stuck_in"] == f"nvmlDeviceGetTemperature {uuid(0)}"
            assert document["gpus"][0]["uuid"] == uuid(0), "what was known stays known"
            assert "hangs in nvmlDeviceGetTemperature" in procs.wait_until("the status", lambda: next((text for text in service.notify.told("STATUS") if "hangs" in text), ""))
            procs.wait_until("another sampler", lambda: service.sampler().pid != first)
            service.stub.set(hang=None)
            listener.snapshot(lambda found: not found["stuck_in"] and has_gpus(found))
            assert [each["detector"] for _, each in listener.findings] == ["gpu_stuck"], "once, however many samplers it took"

    def test_from_the_very_first_call(self) -> None:
        with GpuService(call_timeout_s=0.5, start=False) as service:
            service.stub.set(hang="nvmlInit")
            service.start()
            assert "nvmlInit" in service.listen("?since=1").finding(detector="gpu_stuck")[1]["what"]
            assert service.status()["stuck_in"] == "nvmlInit"

    def test_clients_hear_meanwhile_and_the_kernel_s_log_is_read(self) -> None:
        with GpuService(call_timeout_s=1.0) as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.stub.set(hang="*")
            listener.finding(detector="gpu_stuck")
            service.log.xid(79)
            assert listener.finding(xid=79)[1]["uuid"] == uuid(0)
            seen = len(listener.snapshots)
            procs.wait_until("more documents", lambda: len(listener.snapshots) > seen + 2)

    def test_a_sampler_that_is_stopped_is_replaced(self) -> None:
        with GpuService(call_timeout_s=0.5) as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            first = service.sampler().pid
            os.kill(first, signal.SIGSTOP)
            listener.finding(detector="gpu_stuck")
            procs.wait_until("another sampler", lambda: service.sampler().pid != first)
            listener.snapshot(lambda found: not found["stuck_in"] and has_gpus(found))


class TestADriverThatGoes:
    @pytest.mark.parametrize("code", [9, 18])
    def test_it_is_found_again_when_it_is_back(self, code: int) -> None:
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.stub.set(init=code, all=1)
            listener.snapshot(lambda found: found["source"] == "none")
            assert procs.wait_until("the word", lambda: "driver is gone" in service.said())
            service.stub.set(init=None, all=None, driver="580.1")
            document = listener.snapshot(has_gpus)
            assert document["driver_version"] == "580.1"
            procs.wait_until("the word", lambda: "580.1 is there" in service.said())
            service.stub.event(31)
            assert listener.finding(xid=31)[1]["uuid"] == uuid(0)

    def test_a_sampler_that_dies_is_started_again(self) -> None:
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            first = service.sampler().pid
            os.kill(first, signal.SIGKILL)
            procs.wait_until("another sampler", lambda: service.sampler().pid != first)
            seen = len(listener.snapshots)
            procs.wait_until("a snapshot of it", lambda: len(listener.snapshots) > seen)


def test_without_any_driver_there_is_nothing_and_it_lives() -> None:
    with GpuService(env={"LD_LIBRARY_PATH": "/nowhere"}) as service:
        document = service.listen().snapshot(lambda found: "note" in found)
        assert (document["source"], document["gpus"]) == ("none", [])
        assert "Not Found" in document["note"]
        assert service.stop() == 0


def test_an_observed_detector_quarantines_nothing() -> None:
    with GpuService(2, observe="gpu_xid") as service:
        listener = service.listen()
        listener.snapshot(has_gpus)
        service.log.xid(48, 0)
        listener.finding(xid=48)
        service.log.xid(79, 1)  # of another detector
        procs.wait_until("the quarantine of the other", lambda: uuid(1) in quarantined(service))
        assert set(quarantined(service)) == {uuid(1)}
        assert "only observed: not quarantined" in service.said()
        assert b'detector="gpu_xid",class="reset"} 1' in service.ask("/metrics")


def test_three_errors_of_two_engines_make_a_gpu_suspect() -> None:
    with GpuService() as service:
        listener = service.listen()
        listener.snapshot(has_gpus)
        for number, pid in ((31, 5), (13, 5), (43, 6)):
            service.log.xid(number, pid=pid)
        listener.finding(cls="human", xid=0)
        assert listener.snapshot(lambda found: found["gpus"][0]["verdict"]["class"] == "suspect")
        assert quarantined(service) == {}


def test_a_gpu_cleared_by_a_person_is_used_again_and_quarantined_again() -> None:
    with GpuService() as service:
        listener = service.listen()
        listener.snapshot(has_gpus)
        for _ in range(2):
            service.log.xid(64)
            procs.wait_until("the quarantine", lambda: quarantined(service))
            listener.snapshot(lambda found: found["gpus"][0]["quarantine"] is not None)
            quarantine.clear(service.paths, uuid(0))
            listener.snapshot(lambda found: found["gpus"][0]["quarantine"] is None)
            time.sleep(2.0)  # SAME_S: the same error within it is the same


class TestTheService:
    def test_it_is_ready_pings_the_watchdog_and_stops_cleanly(self) -> None:
        with GpuService(env={"WATCHDOG_USEC": "600000"}) as service:
            service.listen().snapshot(has_gpus)
            procs.wait_until("three pings", lambda: service.notify.told("WATCHDOG").count("1") >= 3)
            procs.wait_until("the status", lambda: "1 GPU" in service.notify.told("STATUS"))
            sampler = service.sampler().pid
            assert service.stop() == 0
            assert service.notify.told("STOPPING") == ["1"]
            assert not procs.is_alive(sampler)
            assert not service.paths.gpu_socket.exists()

    def test_a_second_one_is_refused(self) -> None:
        with GpuService() as service, GpuService(start=False) as second:
            os.rmdir(second.paths.runtime) if second.paths.runtime.exists() else None  # noqa: PTH106
            second.paths.runtime.symlink_to(service.paths.runtime)
            with pytest.raises(AssertionError, match="gpu-watch runs"):
                second.start()
            assert second.process is not None
            assert second.process.wait(5) == 75

    def test_with_its_sampler_it_is_small(self) -> None:
        """`make bench` has the figure, and the CPU's; here it must not silently become another."""
        with GpuService(8) as service:
            service.listen().snapshot(lambda found: len(found["gpus"]) == 8)
            assert private_memory_bytes(service.pid) + private_memory_bytes(service.sampler().pid) < 64 << 20

    def test_no_sampler_outlives_a_service_that_was_killed(self) -> None:
        with GpuService() as service:
            service.listen().snapshot(has_gpus)
            sampler = service.sampler().pid
            service.stop(signal.SIGKILL)
            procs.wait_until("the end of the sampler", lambda: not procs.is_alive(sampler))

    def test_the_sampler_gets_no_secrets_and_no_notify_socket(self) -> None:
        with GpuService(env={"VLLM_API_KEY": "x", "HF_TOKEN": "x", "WATCHDOG_USEC": "9000000"}) as service:
            service.listen().snapshot(has_gpus)
            names = set(procs.environ_of(service.sampler().pid))
            assert not names & {"VLLM_API_KEY", "HF_TOKEN", "NOTIFY_SOCKET", "WATCHDOG_USEC"}
            assert "PATH" in names

    def test_clients_that_never_read_cost_nobody_anything(self) -> None:
        with GpuService(interval_s=0.02) as service:
            for index in range(1, 12):
                service.stub.add(f"GPU-{index:08x}-1111-2222-3333-444455556666")
            service.stub.write()
            lazy = []
            try:
                for _ in range(40):
                    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    link.connect(str(service.paths.gpu_socket))
                    link.sendall(b"GET /events HTTP/1.1\r\n\r\n")
                    lazy.append(link)
                listener = service.listen()
                listener.snapshot(lambda found: len(found["gpus"]) == 12)
                before = len(listener.snapshots)
                procs.wait_until("two hundred documents", lambda: len(listener.snapshots) > before + 200, 30)
                for number in (31, 13, 43):
                    at = time.monotonic()
                    service.log.xid(number, pid=5)
                    assert listener.finding(xid=number)[0] - at < 0.5
                assert json.loads(service.ask())["gpus"]
                assert int(next(line for line in service.ask("/metrics").decode().splitlines() if line.startswith("vllmd_gpu_watch_subscribers ")).split()[1]) == 41
            finally:
                for link in lazy:
                    link.close()
            procs.wait_until("their leaving", lambda: b"vllmd_gpu_watch_subscribers 1\n" in service.ask("/metrics"))

    @pytest.mark.parametrize("request_bytes", [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"POST /events HTTP/1.1\r\n\r\n", b"GET /events?since=x HTTP/1.1\r\n\r\n", b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 100_000])
    def test_requests_that_make_no_sense_are_answered_or_dropped(self, request_bytes: bytes) -> None:
        with GpuService() as service:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.settimeout(5)
                link.connect(str(service.paths.gpu_socket))
                try:
                    link.sendall(request_bytes)
                    link.shutdown(socket.SHUT_WR)
                    assert b" 200 " not in link.recv(65536)
                except OSError:
                    pass
            assert service.status()["schema"] == 1

    def test_a_client_that_comes_back_hears_what_it_missed(self) -> None:
        with GpuService() as service:
            listener = service.listen()
            listener.snapshot(has_gpus)
            service.log.xid(31, pid=5)
            _, first = listener.finding(xid=31)
            service.log.xid(13, pid=5)
            listener.finding(xid=13)
            back = service.listen(f"?since={first['at']:.3f}")
            assert back.finding(xid=13)
            assert service.listen().snapshot(has_gpus)
            assert [each["xid"] for _, each in back.findings if each["at"] > first["at"]] == [13]
