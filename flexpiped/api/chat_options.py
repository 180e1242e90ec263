"""How the chat template is rendered: what a request may say of it, read and checked.

Which values a template knows, its author says: others change nothing, as in vLLM.
"""

from collections.abc import Mapping, Set
from typing import Any, Final

from engines.text.wire import ChatOptions
from flexpiped.api.errors import invalid
from flexpiped.api.fields import Body, Reader, boolean, wrong_type


def _values(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    return value


READERS: Final[Mapping[str, Reader[Any]]] = {
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "chat_template_kwargs": Reader(parse=_values, schema={"type": "object"}),
}
CHAT_OPTIONS: Final = frozenset(READERS)


def read_chat_options(body: Body, *, taken: Set[str]) -> ChatOptions:
    """Return what a chat says of its template. Raises: ApiError, with the parameter named."""
    given = {name: read(body, name) for name, read in READERS.items() if name in taken}
    opens, goes_on = given.get("add_generation_prompt"), given.get("continue_final_message") or False
    if goes_on and opens is not False:  # it is on by default, and in vLLM, too, has to be turned off
        message = "continue_final_message needs add_generation_prompt: false"
        raise invalid(message, param="continue_final_message", code="contradiction")
    return ChatOptions(
        add_generation_prompt=opens is not False,
        continue_final_message=goes_on,
        template_kwargs=given.get("chat_template_kwargs") or {},
    )
