"""The journal's kinds for causes of failures (core/faults): event -> (MESSAGE_ID, subject, text). Part of messages.MESSAGES."""

from __future__ import annotations

_SEE = "`vllmctl incidents @VLLMD_INSTANCE@ @VLLMD_INCIDENT@` shows the evidence."
_EDIT = "`vllmd check @VLLMD_INSTANCE@ --show-origin` names the file of each setting."
_AGAIN = "systemd starts the instance again, up to its start limit."
_NOT_AGAIN = "systemd does not start it again, because the same would happen; after the repair: `systemctl start vllmd@@VLLMD_INSTANCE@`."

CAUSES: dict[str, tuple[str, str, str]] = {
    "cause-host-out-of-memory": (
        "249a8b35ca3283fb12c1a07904c8ad72",
        "The engine of instance @VLLMD_INSTANCE@ was killed for want of memory",
        "The kernel's out-of-memory killer took processes of the engine: the host had no memory left, or the unit reached its\n"
        f"MemoryMax=. `journalctl -k -e` lists what was large. {_AGAIN}\n{_SEE}",
    ),
    "cause-gpu-lost": (
        "4b194e63011f3a6176c4887f65fb6b6c",
        "A GPU of instance @VLLMD_INSTANCE@ is lost",
        f"The GPU needs a reset, a reboot of the host, or a person. `vllmctl gpu` shows every GPU with what it needs.\n{_NOT_AGAIN}\n{_SEE}",
    ),
    "cause-gpu-fault": (
        "f5ebe19e6768aa1c8d88032b58654962",
        "A GPU reported an error of the engine of instance @VLLMD_INSTANCE@",
        f"Mostly a fault of a kernel of the engine; the same on one GPU again and again speaks against the GPU (`vllmctl gpu`).\n{_AGAIN}\n{_SEE}",
    ),
    "cause-cuda-out-of-memory": (
        "b3e8fd935f166d7da83b2d2d205e06c9",
        "The model of instance @VLLMD_INSTANCE@ does not fit into the GPU's memory",
        "Weights, KV cache and working memory need more than the engine may use. The hint of the message says which setting to\n"
        f"change and by how much. {_EDIT}\n{_SEE}",
    ),
    "cause-gpu-memory-taken": (
        "e5eccc8888aeb15e12781929e657f974",
        "The GPU memory that instance @VLLMD_INSTANCE@ wants is held by others",
        f"`vllmctl gpu` names the processes and their units. {_AGAIN} Or give the engine less: serve.gpu_memory_utilization.\n{_SEE}",
    ),
    "cause-cuda-out-of-memory-serving": (
        "7d76012cf9f7bddaf41a44b342c0a142",
        "The engine of instance @VLLMD_INSTANCE@ ran out of GPU memory while it served",
        "Something outside its budget grew: another program on the GPU, or the working memory of large batches. The hint of the\n"
        f"message says how far to lower serve.gpu_memory_utilization. {_AGAIN}\n{_SEE}",
    ),
    "cause-nccl-failed": (
        "acb3cbfa9343e5a6c088e5901e564452",
        "The GPUs of instance @VLLMD_INSTANCE@ cannot talk to each other",
        "NCCL, the library between GPUs, failed: a link, a driver, a firewall between hosts, or a GPU that hangs.\n"
        f"`nvidia-smi topo -m` and `vllmctl gpu` show links and errors; engine.env NCCL_DEBUG: INFO says more. {_AGAIN}\n{_SEE}",
    ),
    "cause-peer-lost": (
        "bcf9fdebf8d0ac8dd5bc6db85dacc7df",
        "A host that instance @VLLMD_INSTANCE@ serves its model with is gone",
        f"This instance failed because another did: look at that host's journal first. {_AGAIN}\n{_SEE}",
    ),
    "cause-bad-flag": (
        "1422cc4e3b0dcf3dd2f1278345e65776",
        "The engine of instance @VLLMD_INSTANCE@ refuses its settings",
        f"The message quotes the engine. Correct the instance's file; {_EDIT}\n{_NOT_AGAIN}\n{_SEE}",
    ),
    "cause-bad-model": (
        "fdfd2742694677c745b9b0ee67c2a6fb",
        "The engine of instance @VLLMD_INSTANCE@ refuses the model",
        "Files are missing or broken, do not fit to each other, or the engine's version does not know this kind of model.\n"
        f"`vllmctl store verify` reads every byte. {_NOT_AGAIN}\n{_SEE}",
    ),
    "cause-port-taken": (
        "7d868b541e43921af788d1d1c0d62863",
        "The port of instance @VLLMD_INSTANCE@ was taken while its engine started",
        f"It was free when the start began. `ss -ltnp` names who listens; the next start's checks say it too. {_AGAIN}\n{_SEE}",
    ),
    "cause-compile-cache-poisoned": (
        "d1abd18afd5687244a50d8d7e7299e10",
        "The cache of compiled code of instance @VLLMD_INSTANCE@ is broken",
        "An earlier compilation was cut off, or the disk gave wrong bytes. The cache was moved aside (NAME.bad-INCIDENT beside\n"
        f"it), once, and the next start compiles anew, which takes longer. {_AGAIN} Remove the moved one when you like.\n{_SEE}",
    ),
    "cause-library-missing": (
        "23d5fb99ec117ff98046dd3834462f76",
        "The engine of instance @VLLMD_INSTANCE@ lacks a library, or has one that does not fit",
        f"Its environment is not whole, or made for another machine. `vllmctl engine install` makes a new one.\n{_NOT_AGAIN}\n{_SEE}",
    ),
    "cause-driver-mismatch": (
        "e77e45f791a7415f356b18a39f026480",
        "The GPU driver does not fit the engine of instance @VLLMD_INSTANCE@",
        "The driver is too old for the engine's CUDA, or its library was updated and its kernel module was not: then a reboot\n"
        f"is due. `nvidia-smi` shows both versions. {_NOT_AGAIN}\n{_SEE}",
    ),
    "cause-disk-full": (
        "b964582453a42bbb3c790effc9c44dd8",
        "The engine of instance @VLLMD_INSTANCE@ found no space on a disk",
        f"`df -h` shows which. Caches lie in vllmd's cache directory; /dev/shm and /tmp are the unit's own. {_AGAIN}\n{_SEE}",
    ),
    "cause-worker-hung": (
        "77a61c09570cfc405c298450d0bd374f",
        "A worker of the engine of instance @VLLMD_INSTANCE@ hangs",
        f"The engine waited for it in vain and gave up. The stacks in the evidence show where; look at the GPU too (`vllmctl gpu`).\n{_AGAIN}\n{_SEE}",
    ),
    "cause-cuda-error": (
        "e4cf042308dacc0dc538b6c5a2856de5",
        "A CUDA kernel of the engine of instance @VLLMD_INSTANCE@ failed",
        "A fault of the engine or of the GPU: `vllmctl gpu` shows the GPU's errors. engine.env CUDA_LAUNCH_BLOCKING: 1 names\n"
        f"the kernel, at the price of speed. {_AGAIN}\n{_SEE}",
    ),
    "cause-engine-bug": (
        "170362b52fb395ec6d8a31504bb772c7",
        "The engine of instance @VLLMD_INSTANCE@ crashed",
        f"The evidence has its traceback, fit for a report to the engine's makers. The same crash three times in a row is said so.\n{_AGAIN}\n{_SEE}",
    ),
    "cache-moved": (
        "84c50167520193990acd1503bb5861b8",
        "The cache of compiled code of instance @VLLMD_INSTANCE@ was moved aside",
        "It broke the start. The message says from where to where. It is made anew; the moved one may be removed.\nNothing needs to be done.",
    ),
    "evidence-incomplete": (
        "67dc850079e70cb9f6ecd408818380f6",
        "Evidence of a failure of instance @VLLMD_INSTANCE@ is incomplete",
        "Something could not be read or written within its few seconds, which never delays the end of the instance. The message\n"
        "says what and why; a full disk is the usual reason (`df -h`).",
    ),
}
