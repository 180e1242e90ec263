"""Where answers differ from those of vLLM's own server, and why: patterns of "ENGINE: REQUEST: DIFFERENCE"."""

from collections.abc import Mapping
from typing import Final

_ABSENT: Final = "it says nothing of an answer; null and absent are one to clients, and each chunk is that much shorter"
_ERRORS: Final = "OpenAI's types and codes: one shape for the daemon's own errors, whatever the engine"
_PARAMETER: Final = (
    "the parameter is named as the client wrote it, where vLLM names none, another or a place in its models"
)
_STRICT: Final = "what would be ignored is refused by name"
_ECHOED: Final = "echo gives them as logprobs, as OpenAI's does"
_LIKELIEST: Final = "they are the likeliest, as OpenAI's; vLLM begins them with the chosen one, and tells of one less"
_COMPLETE: Final = "an output that is complete ends without a token that says so"
_CUT: Final = "bytes that make no character by themselves are shown as U+FFFD, where vLLM shows nothing"

KNOWN: Final[Mapping[str, str]] = {
    # --- members of answers ---
    "*: system_fingerprint: * -> nothing": "the layout below an answer changes live: none would hold for long",
    "*routed_experts: null -> nothing": _ABSENT,
    "*token_ids: null -> nothing": _ABSENT,
    "*: ec_transfer_params: null -> nothing": _ABSENT,
    "*: kv_transfer_params: null -> nothing": _ABSENT,
    "*: metrics: null -> nothing": _ABSENT,
    "*: service_tier: null -> nothing": _ABSENT,
    "*: usage.*_tokens_details: null -> nothing": _ABSENT,
    "*prompt_logprobs: null -> nothing": _ABSENT,
    "*: prompt_text: null -> nothing": _ABSENT,
    "*.message.a*: null -> nothing": _ABSENT,  # annotations, audio
    "*.message.function_call: null -> nothing": _ABSENT,
    "*.message.reasoning: null -> nothing": _ABSENT,
    "native: chat*.logprobs.refusal: nothing -> null": "OpenAI's answers have it",
    "native: *echo*: choices.#.prompt_logprobs: * -> nothing": _ECHOED,
    "native: *alone: choices.#.prompt_logprobs: * -> nothing": _ECHOED,
    "native: *echo with both logprobs: choices.#.logprobs.top_logprobs.#.*: nothing -> *": _ECHOED,
    "native: completion, stream with echo: choices.0.prompt_token_ids: * -> nothing": "they were not asked for",
    "native: chat, top logprobs, unlikely token: *.top_logprobs.#.*": _LIKELIEST,
    "native: completion, prompt alone: usage.*": "nothing is generated; vLLM makes one token and hides it",
    "native: completion, choice: usage.*": _COMPLETE,
    "native: completion, regex: usage.*": _COMPLETE,
    "native: *: usage.prompt_tokens_details: * -> {*": "what was in the KV cache is told; vLLM does so if asked",
    "native: best_of: usage.*": "best_of is honoured, and all that is made counts; vLLM has it no more",
    "native: tools, *: usage.*": "vLLM leaves the spaces of JSON to the model; calls are spaced as templates show them",
    'native: tools, *: choices.#.message.content: "" -> null': "beside calls OpenAI's is null where nothing is said",
    # --- texts of bytes that are no character ---
    '*text: * -> *\N{REPLACEMENT CHARACTER}"': _CUT,
    'native: *.message.content: * -> *\N{REPLACEMENT CHARACTER}"': _CUT,
    "native: *logprobs.t*\N{REPLACEMENT CHARACTER}*": _CUT,
    "native: *.top_logprobs.#.: * -> nothing": _CUT,
    'native: *.decoded_token: "" -> *': _CUT,
    "native: completion, echo with*logprobs: choices.#.logprobs.text_offset.#: *": _CUT,
    # --- errors ---
    '*: error.type: "Bad*': _ERRORS,
    '*: error.type: "NotFoundError" -> "not_found_error"': _ERRORS,
    "*: error.code: 40* -> *": _ERRORS,
    "*: error.param: *": _PARAMETER,
    "*: unknown parameter: status: 200 -> 400": _STRICT,
    "*: guided_json, of old: status: 200 -> 400": _STRICT,
    "vllm: best_of: status: 200 -> 400": _STRICT,
    "*: chat, message without content: status: 200 -> 400": "OpenAI's API requires it",
    "native: tool without type: status: 200 -> 400": "OpenAI's API requires it",
    "native: result without id: status: 200 -> 400": "OpenAI's API requires it",
    "native: call's arguments are no JSON: status: 200 -> 400": "chat templates are given them as an object",
    "native: unknown role: status: 200 -> 400": _STRICT,
    "native: tokenize, texts of tokens: status: 200 -> 400": "refused by name: only vLLM's server gives them",
    "native: detokenize outside the vocabulary: status: 200 -> 400": "there are no such tokens",
    "native: nothing allowed: status: 500 -> 400": "it is the request that leaves nothing",
    "*: empty text: status: 400 -> 200": "the token of the beginning is a prompt; OpenAI's API takes it",
    "native: completion, two greedy choices: status: 400 -> 200": "OpenAI's API takes it: they are alike",
    "*: tools empty: status: 400 -> 200": "no tools are asked for",
    "*: tool_choice without tools: status: 400 -> 200": '"auto" of no tools changes nothing',
    # --- the daemon's own ---
    "*: model: status: 404 -> 200": "OpenAI's API has it",
    '*: models: data.#.owned_by: "vllm" -> "flexpiped"': "it is so",
    "*: models: data.#.parent: *": "only adapters have one",
    "*: models: data.#.permission: *": "OpenAI's API has it no more",
    "*: models: data.#.root: *": "where its files are is no client's business",
    "*: version: *": "it is flexpiped's, and says which engine serves",
    "*: no such path: *": _ERRORS,
    "*: wrong method: *": _ERRORS,
}
