"""What the process that runs transformers' generate is told and what it answers: one JSON object a line."""

import msgspec


class Generate(msgspec.Struct, frozen=True, kw_only=True):
    """Continue all prompts as one batch, greedily. ``cache`` is an implementation's name; empty: the default."""

    prompts: list[list[int]]
    max_tokens: int
    cache: str


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    tokens: int
    took_s: float
