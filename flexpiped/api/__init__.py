"""The HTTP API in OpenAI's shape."""
