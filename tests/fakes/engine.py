#!/usr/bin/env python3
"""A fake vLLM: the command line, output, processes, sockets, HTTP and exits of `vllm serve` 0.32, in a fraction of a second.

Give its absolute path as `engine.executable:`; it needs nothing but Python's standard library and the folder fake_engine
beside it. tests/engine/test_contract.py runs against it *and* the real vLLM, so that it cannot drift.

    engine.py serve MODEL [vLLM's flags]      engine.py --version

What goes wrong, and when, is said in the environment (`engine.env:` of an instance). An unknown FAKE_ name is an error.
S are seconds (fractions allowed), counted from the start of the process or, with _READY, from the first 200.

| mode | values (default first) | what it does |
|---|---|---|
| FAKE_SPEED | 1 | all its own delays are divided by this |
| FAKE_START_S | 0.2 | the whole start, from the process to the first 200; what exceeds 4 s is all spent loading |
| FAKE_PROGRESS | strong, cpu, lines, none | while loading: percentages, a CPU that burns, a line every FAKE_LINE_S, nothing |
| FAKE_LINE_S | 60 | interval of the lines of FAKE_PROGRESS=lines |
| FAKE_FAIL_S | 0.05 | delay of an exit for a bad flag, a port in use, a missing model |
| FAKE_EXIT, FAKE_EXIT_READY | CODE@S | exits with CODE after S (its children live on, as after a SIGKILL); READY: a test that wants READY told first gives it a second |
| FAKE_ERROR | text | printed as an error line of EngineCore just before such an exit |
| FAKE_FAIL_FIRST | N:FILE | the first N starts exit with 1 while loading; FILE counts them |
| FAKE_BIND | early, never | never: binds no port, and so never listens |
| FAKE_LISTEN | end, never, mute, close@S | bound only; listens but never accepts; closes the listener S after ready |
| FAKE_HEALTH | 200, CODE, CODE@S | the status of /health, S after ready |
| FAKE_HEALTH_DELAY_S | 0 | how long /health takes to answer; `inf` never answers |
| FAKE_COMPLETIONS | ok, 400, 500, hang, empty, WORD@S | what inference answers, S after ready; empty: 200 without a token or vector |
| FAKE_FRONT | ok, busy@S, stuck@S | from S after ready on the API server answers nobody: it computes for ever, or waits for ever |
| FAKE_DEAD_RANK | R@S | with --data-parallel-size N: that rank does nothing any more, S after the start of EngineCore |
| FAKE_PAUSED | no, yes | /is_paused says so, as in dev mode; else it is a 404 |
| FAKE_HELPER | CODE@S | a helper process that ends with CODE, S after ready |
| FAKE_TOKEN_S | 0.005 | time of one step of EngineCore |
| FAKE_TASK | auto, generate, embed, score, transcribe | which routes exist; auto reads the model's directory |
| FAKE_HEARTBEAT | live, frozen, ghost | frozen: counters stand still under load; ghost: they move while idle |
| FAKE_METRICS | ok, huge, garbage, slow, 500, hang, absent, sleeping | /metrics; huge is 64 MB, slow a byte in a tenth of a second; absent: as with --disable-log-stats |
| FAKE_SIGTERM | ok, ignore | once ready |
| FAKE_SIGTERM_STARTING | lost, wedge, die | while starting: goes on to ready; never gets there; ends. A second one always ends it |
| FAKE_DEATH_S | 3 | from the death of EngineCore or a Worker to the API server's exit with 0 |
| FAKE_CORE | ok, exit@S, stop@S | EngineCore exits, or is stopped as by SIGSTOP, S after ready |
| FAKE_HOG | MB:FILE | the Worker takes so much memory as soon as FILE exists |
| FAKE_STRAY | setsid,fork,rename,ignore,env,port | a further process: in a session of its own, double-forked, renamed, ignoring every signal, with an empty environment, holding the port |
| FAKE_CROWD | 0 | so many further processes, with the properties of FAKE_STRAY, or ignoring every signal |
| FAKE_BOMB | DEPTH@S | a fork bomb of 2^DEPTH processes, S after ready; one whose fork is refused tries for ever |
| FAKE_OUTPUT | normal, silent, flood, long, broken | nothing; as fast as the reader reads; lines of 10 MB; broken UTF-8 and NULs |
| FAKE_OUTPUT_MB | 0 | ends flood, long and broken after so much (0: never) |
| FAKE_SHM_MB | 0 | litter in /dev/shm of this size (dies where it does not fit), and sockets in TMPDIR |
| FAKE_DUMP | FILE | at the start, writes argv, environ, cwd, pid, cgroup and monotonic time there as JSON |

`--headless` (vLLM's own flag) makes it a node that never listens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_engine.main import main  # type: ignore[import-not-found,unused-ignore]

if __name__ == "__main__":
    sys.exit(main(sys.argv))
