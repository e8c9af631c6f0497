"""vllmd: the systemd-native supervisor daemon for vLLM."""

import gc

__version__ = "0.1.0"

# Importing makes tens of thousands of objects that stay; to look through them each 700 took 9 of 160 ms of a command.
gc.set_threshold(50_000)
