"""Runs inside SGLang's processes: imports the standard library, torch and sglang only, and nothing of the daemon's."""
