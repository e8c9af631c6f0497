"""vllmd: the systemd-native supervisor daemon for vLLM."""

__version__ = "0.1.0"
