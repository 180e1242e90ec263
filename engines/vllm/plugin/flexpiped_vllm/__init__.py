"""Runs inside vLLM's processes: imports the standard library, torch and vllm only, and nothing of the daemon's."""
