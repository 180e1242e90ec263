"""What the daemon looks at in a request for the engine's own server, because that server does not. Pure."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from engines.protocol import EngineCapabilities
from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body
from flexpiped.api.parameters import ensure_model
from flexpiped.api.unsupported import NeutralValues, has_no_effect


def refuse_unfit(body: Body, *, served: str, capabilities: EngineCapabilities) -> None:
    """Return when the engine's own server can be trusted with ``body``.

    Raises:
        ApiError: It would take another model's name for this one's, or a token id would end the engine.
    """
    own = capabilities.own_server
    if own is None:
        return
    model = body.get("model")
    if own.adapter_mark and isinstance(model, str) and not model.startswith(served + own.adapter_mark):
        ensure_model(model, served=served)
    for name in own.token_id_names & body.keys():
        ids = _ids_in(body[name], is_prompt=name in own.prompt_names)
        if not all(0 <= token_id < capabilities.vocab_size for token_id in ids):
            raise invalid(
                f"{name}: token ids must be from 0 to {capabilities.vocab_size - 1}", param=name, code="invalid_value"
            )


def refuse_lost(body: Body, *, names: frozenset[str], neutral: NeutralValues, because: str) -> None:
    """Return when the engine's own server, which is needed ``because``, knows every parameter that has an effect.

    Args:
        names: That it knows.
        neutral: Values that change nothing.

    Raises:
        ApiError: It would ignore one.
    """
    others = {name: value for name, value in body.items() if name not in names}
    lost = next((name for name, value in others.items() if not has_no_effect(value, neutral.get(name, ()))), None)
    if lost is not None:
        raise invalid(
            f"{lost} does not go together with {because}: the engine's own server, which has that, has no {lost}",
            param=lost,
            code="unsupported_parameter",
        )


def _ids_in(value: Any, *, is_prompt: bool) -> Iterator[float]:
    """Yield the token ids of ``value``, a number or lists of them, as such a server reads it: "5" and 5.0 are 5, too.

    A prompt may be text, or a list of texts; one that holds a number as well is one of token ids.
    """
    if isinstance(value, list):
        if not (is_prompt and all(isinstance(each, str) for each in value)):
            for each in value:
                yield from _ids_in(each, is_prompt=False)
    elif isinstance(value, str):
        if not is_prompt:
            with suppress(ValueError):
                yield float(value)
    elif isinstance(value, int | float):
        yield value
