"""Real vLLM as an engine: a supervised child in its own environment, with a plugin of ours inside."""
