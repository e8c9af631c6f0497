"""One row per kind of event: its MESSAGE_ID, and what `journalctl -x` explains about it.

The journal adapter looks up ids here, and units/vllmd.catalog is printed from here
(`python -m vllmd.system.messages > units/vllmd.catalog`; a test fails on drift). An id is fixed for ever once released:
operators match on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllmd.system import cause_messages

_UNIT = "vllmd@@VLLMD_INSTANCE@.service"
_LOOK = "vllmctl status @VLLMD_INSTANCE@"


@dataclass(frozen=True, slots=True)
class Kind:
    """`subject` is the catalog's headline, `text` what it means and what to do; @FIELD@ is filled in by journalctl."""

    id: str
    subject: str
    text: str


MESSAGES: dict[str, Kind] = {
    "starting": Kind(
        "32c61cab6bbf4c6fbfbad5dc5f5e264a",
        "Instance @VLLMD_INSTANCE@ starts, and something in its configuration is doubtful",
        "The configuration is valid; the message says what in it is probably not meant, or cannot be had from this engine.\n"
        "The start goes on. `vllmd check @VLLMD_INSTANCE@` shows such warnings without a start.",
    ),
    "preflight-passed": Kind(
        "51093f80307b4c3596e1418424eb8a86",
        "The machine is fit for instance @VLLMD_INSTANCE@",
        "The port is free (or was freed of what an earlier life of this instance left) and the GPUs are usable.\n"
        "Nothing needs to be done.",
    ),
    "preflight-failed": Kind(
        "4c1567c734f24932b2793b6d4f06e9ea",
        "Instance @VLLMD_INSTANCE@ was not started: the machine is not fit for it",
        "A check before the start failed: mostly another program that listens on the wanted port, or a GPU that is\n"
        "missing, too hot or full. The message names it, and what to do. Nothing was stopped that is not ours.\n"
        "`vllmd preflight @VLLMD_INSTANCE@` repeats the checks by hand.",
    ),
    "model-resolved": Kind(
        "72da2f57716d4912ba0690dc8e699297",
        "The model of instance @VLLMD_INSTANCE@ was found and verified",
        "The message names the directory that the engine is given, and the source it came from.\nNothing needs to be done.",
    ),
    "model-progress": Kind(
        "a0aa6b00ee8d4c8685449385703615b1",
        "The model of instance @VLLMD_INSTANCE@ is on its way",
        "A source has the model and it is downloaded, or a source cannot be reached and is asked again; the message says\n"
        "which, how much, and from where. An interrupted download goes on where it was, at the next start too.\n"
        f"`{_LOOK}` shows how far it is; a log of a download that failed lies in .staging/ of the model store.",
    ),
    "model-failed": Kind(
        "cdf33dea3fef4d9fb84c07a545d75efc",
        "Instance @VLLMD_INSTANCE@ has no usable model",
        "No source has the model (status 66, tried again later), or what is there is not valid (status 65, not tried\n"
        "again: the same files would fail again). The message lists each source with its reason.\n"
        "`vllmd resolve @VLLMD_INSTANCE@` repeats the search by hand.",
    ),
    "model-prepared": Kind(
        "550dff913f43d8f6feab951aac0ebda1",
        "The engine of instance @VLLMD_INSTANCE@ is given its model with a change, or without one that it needs",
        "The tokenizer's configuration names a class that the engine's libraries do not have. A directory of links to the same\n"
        "files, with that one line repaired, is given to the engine; the model itself stays as it is. Where the message says\n"
        "that this could not be done, the engine will probably refuse the model: do what the message says, or update the\n"
        "engine with `vllmctl engine install`. Otherwise nothing needs to be done.",
    ),
    "engine-spawned": Kind(
        "691f0e82258d4017b6ebe254871d241b",
        "The engine of instance @VLLMD_INSTANCE@ was started",
        "The engine runs as process @VLLMD_PID@ and loads its model. It is not ready yet.\nNothing needs to be done.",
    ),
    "phase": Kind(
        "c28b9fab3fa34b5bb4d1f95b71f2649c",
        "The start of instance @VLLMD_INSTANCE@ made progress",
        "The engine reached the phase @VLLMD_PHASE@.\nNothing needs to be done.",
    ),
    "engine-ready": Kind(
        "d008bacaea1e44afa056921240bc1724",
        "Instance @VLLMD_INSTANCE@ serves its model",
        "The engine answered a real request of the model's task. Clients can be sent to it.\nNothing needs to be done.",
    ),
    "generation": Kind(
        "18cb17b52b2a4522a59a089ebdcd7e04",
        "Instance @VLLMD_INSTANCE@ keeps its configuration as a generation",
        "The configuration, the model's version and the engine reached READY together for the first time, and are kept.\n"
        "`vllmctl generations` lists what is kept, `vllmctl rollback` goes back to it. Where it says that it could not be\n"
        "kept, the instance serves all the same; look at the owner and the free space of the state directory.",
    ),
    "engine-exited": Kind(
        "d4115b9202da4e7187da86791e4d33aa",
        "The engine of instance @VLLMD_INSTANCE@ ended by itself",
        "Nobody asked the engine to end, so this is a failure whatever its exit status says (vLLM exits 0 after its\n"
        "worker was killed). The instance is ended; systemd starts it again, up to its start limit. The entry with the\n"
        "cause follows, and its evidence is kept: `vllmctl incidents @VLLMD_INSTANCE@`. The engine's own last lines:\n"
        f"`journalctl -u {_UNIT} -e`; where memory ran out, the kernel's: `journalctl -k -e`.",
    ),
    "engine-unhealthy": Kind(
        "fa9815edd67d4ea29146741937419fc7",
        "The engine of instance @VLLMD_INSTANCE@ says that it is broken",
        "The engine refused the health question several times in a row, or nobody listens where it served. The instance\n"
        "is ended and systemd starts it again. A slow answer never leads here.\n"
        f"The engine's last lines say why: `journalctl -u {_UNIT} -e`.",
    ),
    "engine-hung": Kind(
        "f28efa36fc73504c5aa23095133ca641",
        "The engine of instance @VLLMD_INSTANCE@ hangs",
        "Its /health may well answer, but it has not moved for watch.hang_timeout_s with work to do, or did not answer a\n"
        "proof of life while idle, or its server answers nothing at all. The message says which, and for how long. The\n"
        "instance is ended with status 75 and systemd starts it again.\n"
        "`vllmctl incidents @VLLMD_INSTANCE@` has the stacks of its processes from before the end. If it was only slow, raise\n"
        "the setting that the message names, and `systemctl reload` the instance.",
    ),
    "engine-died": Kind(
        "0019cb18fef3dfe44f8050c94d5b43ca",
        "A process of the engine of instance @VLLMD_INSTANCE@ died",
        "The message names it (VLLM::EngineCor is the one that computes, VLLM::Worker one of its GPUs), and the engine says\n"
        "503 since: it never recovers from that. The instance is ended with status 70 and systemd starts it again.\n"
        "`vllmctl incidents @VLLMD_INSTANCE@` has the evidence; where memory ran out, so says `journalctl -k -e`.",
    ),
    "would-act": Kind(
        "198489c7fb56ab66214f4277681a8977",
        "A verdict on instance @VLLMD_INSTANCE@ that ended nothing",
        "A detector has come to a verdict, and the instance goes on: the detector is one of watch.observe, or the instance\n"
        f"is paused (`{_LOOK}`). Had it acted, the instance would have been ended and started again.\n"
        f"If it was right, take the detector out of watch.observe and `systemctl reload {_UNIT}`.",
    ),
    "heartbeat-unreadable": Kind(
        "3b774dcf0cf7c7a7f9103168f1204dcf",
        "The heartbeat of the engine of instance @VLLMD_INSTANCE@ cannot be read",
        "The engine answers its health question, but not /metrics, or not in the form that vllmd knows. While this lasts, a\n"
        "hang of it is not noticed. --disable-log-stats among engine.args takes the metrics away: remove it and\n"
        f"`systemctl restart {_UNIT}`. Else ask /metrics of the engine with `curl`: what it answers says why.",
    ),
    "canary": Kind(
        "5910e4b2475610ec268b5dfcfb6f08b9",
        "A proof of life of the idle engine of instance @VLLMD_INSTANCE@ did not succeed",
        "One such answer ends nothing; several failures in a row (watch.failures) end the instance, which is started again.\n"
        "A refusal (4xx) means that the request is not allowed; what the message says of it is the engine's own word. Where the\n"
        "task was guessed wrong, set serve.task; where a good answer takes longer, raise watch.canary_timeout_s.",
    ),
    "clock-gap": Kind(
        "1f557c60af0fca1ee957a0f7d484b511",
        "Instance @VLLMD_INSTANCE@ stood still, with its machine or alone",
        "The machine was suspended, or the supervisor did not run for a while. Everything is measured anew from now on.\n"
        "Nothing needs to be done after a suspend; else the host is short of CPU or memory: `cat /proc/pressure/*`.",
    ),
    "paused": Kind(
        "da545ff7501b907730b4a7cc43523685",
        "The watch over instance @VLLMD_INSTANCE@ is paused",
        "Somebody asked for it with `vllmctl pause`: until the time that the message names, nothing is judged or ended, and\n"
        "a stop goes on as ever. `vllmctl resume @VLLMD_INSTANCE@` ends the pause.",
    ),
    "resumed": Kind(
        "d3c6e3fe4c4333d0d0fff43f595d5624",
        "The watch over instance @VLLMD_INSTANCE@ goes on",
        "The pause was ended, or its time is over. What happened meanwhile is acted upon now.\nNothing needs to be done.",
    ),
    "start-stalled": Kind(
        "1a55071f0857421a9c1af6a898eefaff",
        "The start of instance @VLLMD_INSTANCE@ makes no progress",
        "For longer than start.stall_timeout_s no new phase, byte or percentage was seen. The start was ended and\n"
        "systemd tries again. Where a start is rightly that slow (a compilation, a cold network file system), raise\n"
        "start.stall_timeout_s in the instance's file.",
    ),
    "start-timeout": Kind(
        "9f9a363498774c20b469e7fe158ec388",
        "The start of instance @VLLMD_INSTANCE@ takes too long",
        "The engine was not ready within start.start_timeout_s, although it moved. The start was ended and systemd\n"
        "tries again. Where the model rightly needs longer, raise start.start_timeout_s in the instance's file.",
    ),
    "stopping": Kind(
        "cc444b4da0454c718b9db445ed9abbcc",
        "Instance @VLLMD_INSTANCE@ is stopping",
        "Requests in flight get stop.shutdown_timeout_s to finish; then everything left is killed.\nNothing needs to be done.",
    ),
    "stopped": Kind(
        "6ed72f99f64343d3b0b08ddcb0370f5e",
        "Instance @VLLMD_INSTANCE@ has stopped",
        "It was asked to stop and left no process behind.\nNothing needs to be done.",
    ),
    "failed": Kind(
        "fd39de1393094ad7a6ef5edef190c153",
        "Instance @VLLMD_INSTANCE@ has failed",
        "The supervisor ends with the status that the message names; the first message above it with this instance's\n"
        "name and priority err says what happened. Statuses 2, 3, 64, 65, 69, 77 and 78 are not tried again, because\n"
        f"a restart cannot help: repair what the message says, then `systemctl start {_UNIT}`.\n"
        f"`{_LOOK}` shows the reason again.",
    ),
    "unconfigured": Kind(
        "fb89dd0b41744df9bf02860c300003cd",
        "Instance @VLLMD_INSTANCE@ has no model selected",
        "The unit is up and waits; it holds no GPU and no port. `vllmctl model presets @VLLMD_INSTANCE@` shows what fits\n"
        "this host, and `vllmctl model set @VLLMD_INSTANCE@ PRESET` chooses it and restarts the unit.",
    ),
    "reloaded": Kind(
        "1870bf442a424f11b7514541ccec2fee",
        "Instance @VLLMD_INSTANCE@ has read its configuration again",
        "All changes are in force.\nNothing needs to be done.",
    ),
    "reload-needs-restart": Kind(
        "ca3280b5cf204b89a66b6c487a004387",
        "Changes to instance @VLLMD_INSTANCE@ wait for a restart",
        "The configuration was read again, but the settings that the message names are in force only after\n"
        f"`systemctl restart {_UNIT}`, which interrupts serving.",
    ),
    "key-made": Kind(
        "dc7bc7147d324d53906e079dd794de3d",
        "Instance @VLLMD_INSTANCE@ has a new API key",
        "Clients must send a key (serve.auth), and there was none: neither one that was made before, nor serve.api_key or a\n"
        "credential api-key. So one was made. `vllmctl api-key show @VLLMD_INSTANCE@` prints it; programs of this host read it in\n"
        "public/@VLLMD_INSTANCE@/credentials.json of the state directory. Where there had been one, its file is lost: clients need the new one.",
    ),
    "keys-changed": Kind(
        "80d27fe9307c48a3bb60a8846afdee1c",
        "The API keys of instance @VLLMD_INSTANCE@ were changed",
        "Somebody made, replaced or revoked a key with `vllmctl api-key`; the message says which, and who. A running engine\n"
        "goes by it at once. Nothing needs to be done.",
    ),
    "keys-taken": Kind(
        "a09cef1350114f56ba3b6b148ce60144",
        "The engine of instance @VLLMD_INSTANCE@ goes by other API keys",
        "The keys of `vllmctl api-key` were read again, without a restart; the message names those that hold. Keys that the\n"
        "configuration gives hold besides.\nNothing needs to be done.",
    ),
    "keys-refused": Kind(
        "287935e21ff64605b1d1ffac19399449",
        "The changed API keys of instance @VLLMD_INSTANCE@ were not taken over",
        "keys.json of the instance cannot be read, or is not what it should be; the message says where and why. The engine goes by\n"
        "the keys that it had. Correct the file, or remove it (the next start makes a new key), and\n"
        f"`systemctl reload {_UNIT}`.",
    ),
    "leftovers-swept": Kind(
        "5844fe9d033c41e3aa737923d401934b",
        "An earlier life of instance @VLLMD_INSTANCE@ left processes, which were ended",
        "The supervisor had been killed before it could stop its engine. The processes held GPU memory; they are gone.\n"
        "If this comes back, find out what kills the supervisor: `journalctl -k -e` names the out-of-memory killer.",
    ),
    "unkillable": Kind(
        "244be7f95d524fc1b5d9822515748368",
        "Processes of instance @VLLMD_INSTANCE@ cannot be killed",
        "They were sent SIGKILL and are still there after stop.kill_timeout_s: they sit in a system call that does not\n"
        "return, mostly in a GPU driver or a dead network file system (`ps -o pid,state,wchan:30,cmd -p PID`, state D).\n"
        "`journalctl -k -e` mostly shows why. Often only a reboot frees what they hold.",
    ),
    "gpu-waiting": Kind(
        "76851eb66bed4726b3eff8ac43189473",
        "Instance @VLLMD_INSTANCE@ waits for GPUs",
        "Another instance holds a GPU that this one wants, or its memory is not free yet; the message names who has it.\n"
        "The start goes on as soon as it is free, and gives up after preflight.gpu_wait_s (status 75, tried again later).\n"
        "`vllmctl gpu` shows who has which GPU. To let instances share GPUs on purpose, set gpus_shared in each of them.",
    ),
    "gpu-trouble": Kind(
        "7ab4363087a94dbd870f6e4f5c076f83",
        "Something is the matter with a GPU of instance @VLLMD_INSTANCE@",
        "The driver or the kernel reported something that does not end the engine: a warning, an error that follows another,\n"
        "or one that no process is named for. The message says what it means, and the hint what to do and when.\n"
        "`vllmctl gpu` shows every GPU of this host.",
    ),
    "gpu-verdict": Kind(
        "3a44bef28d1e4bc19b7fd97f480cd89b",
        "A GPU error ends the engine of instance @VLLMD_INSTANCE@",
        "The engine's own work has failed on the GPU (code gpu_xid, status 70: started again), or the GPU needs a reset, a\n"
        "reboot or a person (gpu_lost, gpu_quarantined, status 69: not started again, since that cannot help). Then no\n"
        "instance starts on this GPU until the quarantine is lifted; `vllmctl gpu` shows it, and what to do.\n"
        "To let a detector only count, name it in watch.observe.",
    ),
    "gpu-memory-not-back": Kind(
        "01250c413750460290a37a631970c514",
        "GPU memory of instance @VLLMD_INSTANCE@ did not come back",
        "Nothing of the engine is left, and after stop.gpu_release_timeout_s a GPU still has less memory free than before\n"
        "the start. The message names who has it, where that can be seen. The supervisor ends with status 75, and the next\n"
        "start waits for the memory again. `vllmctl gpu` and `nvidia-smi` show it; a process in state D goes with a reboot.",
    ),
    "metrics-unavailable": Kind(
        "46155564c9e065f5a01a8a8dc41ded73",
        "Instance @VLLMD_INSTANCE@ cannot publish its metrics",
        "The address of metrics.listen is not free, or the file of metrics.textfile cannot be written; the message says which,\n"
        "and why. The model is served all the same, and it is tried again by itself. `ss -ltnp` shows who has a port. A changed\n"
        f"setting applies after `systemctl reload {_UNIT}`, without an interruption.",
    ),
    "gpu-watching": Kind(
        "abfbf6049d97ba7f3c1e88d83bb791d0",
        "The GPUs of this host are watched",
        "vllmd-gpu.service has begun to sample the driver and to read the kernel's log. Instances are its clients.\n"
        "Nothing needs to be done. `vllmctl gpu` shows every GPU.",
    ),
    "gpu-finding": Kind(
        "e8a2d098b54cd4891d15062f11429aac",
        "Something was noticed about GPU @VLLMD_GPU@",
        "An Xid, or a figure of the driver's, that means something; the message says what, and its class (VLLMD_CLS): app (an\n"
        "application's fault: its instance restarts it), sympathetic (follows another), nvlink, warn (reset at the next stop), human,\n"
        "ask, and reset, reboot or replace, which quarantine the GPU. docs/gpu.md explains each; `vllmctl gpu` shows every GPU.\n"
        "The same error is told once a minute here, and counted.",
    ),
    "gpu-quarantined": Kind(
        "7010a9995b31c3ef2b58eaace449ec15",
        "GPU @VLLMD_GPU@ is quarantined",
        "No instance starts on it any more (status 69): it must be reset (class reset), the host rebooted (reboot), or a person must\n"
        "look (replace). The hint says how. A reboot lifts the first two; `vllmctl gpu clear @VLLMD_GPU@` lifts each.",
    ),
    "gpu-quarantine-failed": Kind(
        "ddb5305d7de4e33f5f0aebc4b190d322",
        "The quarantine of GPU @VLLMD_GPU@ could not be written",
        "The GPU needs a reset, a reboot or a person, and its record below the state directory's gpus/ could not be written: the\n"
        "message says why. Until then instances may start on it. Mostly the disk is full: `df -h`.",
    ),
    "gpu-released": Kind(
        "7bdbee0fbf666c038cce23d05fec92d1",
        "GPU @VLLMD_GPU@ may be used again",
        "The driver had asked for a reset, and asks for nothing any more: the quarantine was lifted.\n"
        "Instances that ended with status 69 are started by hand: `systemctl start vllmd@NAME`.",
    ),
    "gpu-would-quarantine": Kind(
        "075379879b1ab21b8ef47168ef0b095c",
        "A finding about GPU @VLLMD_GPU@ that quarantined nothing",
        "Its detector is one of watch.observe in vllmd.yaml, so it is only told and counted. Else the GPU would be quarantined now.\n"
        "Nothing needs to be done; take the detector out of watch.observe once you trust it.",
    ),
    "gpu-stuck": Kind(
        "22267ecb763528c2ddc44e429bc67b79",
        "The GPU driver does not return from a call",
        "The message names the call, which has lasted longer than gpu_watch.call_timeout_s. It cannot be ended; the process in it\n"
        "is left behind and another one asks again. Engines go on for as long as their own heartbeat does.\n"
        "`journalctl -k -g NVRM` may say why. A wedged driver mostly needs a reboot.",
    ),
    "gpu-driver-gone": Kind(
        "e95cf6f96b2cc40e085d9009f2329908",
        "The GPU driver is gone",
        "It was unloaded, or replaced by another version. It is looked for again, with pauses of up to twelve intervals.\n"
        "After an update, `nvidia-smi` says whether library and kernel module fit; a reboot makes them.",
    ),
    "gpu-driver-back": Kind(
        "81120ccf64aa0b9820e5e395a1eaedb1",
        "The GPU driver is there again",
        "Sampling goes on.\nNothing needs to be done.",
    ),
    "gpu-log-unreadable": Kind(
        "f34b1371cd77e4d239072583f73f6f81",
        "The kernel's log cannot be read for GPU errors",
        "Xids are then known from the driver's events only: without the process that caused them, and not from before the start.\n"
        "vllmd-gpu.service has CAP_SYSLOG for it; by hand it needs root, or `sysctl kernel.dmesg_restrict=0`.",
    ),
    "lines-dropped": Kind(
        "449d236bf9644d53b2cbe57358dddd17",
        "Lines of the engine of instance @VLLMD_INSTANCE@ were dropped",
        "The engine wrote more than log.lines_per_s, or the journal did not take what we sent for a while. The\n"
        "supervisor's own messages are dropped last. `systemctl status systemd-journald` shows whether it runs.",
    ),
    **{event: Kind(*row) for event, row in cause_messages.CAUSES.items()},
}


def message_id(event: str) -> str:
    """32 hex digits; KeyError for an event that has no row (a bug)."""
    return MESSAGES[event].id


def catalog() -> str:
    """The journal's message catalog, as units/vllmd.catalog."""
    head = "# Made by `python -m vllmd.system.messages`; change vllmd/system/messages.py instead.\n"
    entry = "\n-- {id}\nSubject: {subject}\nDefined-By: vllmd\nDocumentation: man:vllmd-journal(7)\n\n{text}\n"
    return head + "".join(entry.format(id=kind.id, subject=kind.subject, text=kind.text) for kind in MESSAGES.values())


if __name__ == "__main__":
    print(catalog(), end="")
