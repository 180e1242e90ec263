"""Real SGLang as an engine: runs in an environment of its own, with a plugin of ours inside."""
