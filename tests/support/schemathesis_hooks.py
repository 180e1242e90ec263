"""What schemathesis checks besides: what ``/openapi.json`` describes is served, or refused for what no schema says.

Loaded by its command line (``SCHEMATHESIS_HOOKS``), in place of two of its own checks that know no reasons.
"""

import schemathesis
from schemathesis import Case, CheckContext, Response

# Between several parameters, within a string (whether its characters can be shown), or known to the tokenizer, the chat
# template or the adapters that are loaded only.
NO_SCHEMA_SAYS = frozenset(
    {"context_length_exceeded", "contradiction", "invalid_grammar", "invalid_prompt", "unknown_token"}
    | {"invalid_arguments", "adapter_refused"}
)
TOO_LATE = "deadline_exceeded"


@schemathesis.check
def described_requests_are_served(_ctx: CheckContext, response: Response, case: Case) -> None:
    """Raises: AssertionError."""
    if response.status_code < 400:
        return
    error = response.json()["error"]
    if response.status_code >= 500:
        assert (response.status_code, error["code"]) == (503, TOO_LATE), f"a server error: {error}"
        assert int(response.headers["retry-after"][0]) >= 1
    elif response.status_code == 400 and case.meta is not None and case.meta.generation.mode.is_positive:
        assert error["code"] in NO_SCHEMA_SAYS, f"refused, though it is described: {error}"
