"""The fake vLLM in its parts: modes, arguments, output, the engine's processes, the API server. Standard library only."""
