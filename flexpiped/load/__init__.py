"""The load generator behind ``flexctl bench``: requests of a trace against any OpenAI-compatible URL."""
