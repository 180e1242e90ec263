"""What vLLM's own OpenAI server knows, by name. Pure.

The names are the fields of vLLM 0.32's request models. vLLM ignores a name that it does not know, so one that is
missing here is refused by the daemon and never lost in silence; a test compares them with the vLLM that runs.
"""

from collections.abc import Sequence
from typing import Final

from engines.offers import OwnServer

_BOTH: Final = {
    *("model", "stream", "stream_options", "user", "n", "max_tokens", "seed", "stop", "stop_token_ids"),
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    *("logit_bias", "allowed_token_ids", "bad_words", "use_beam_search", "length_penalty", "repetition_detection"),
    *("logprobs", "prompt_logprobs", "logprob_token_ids", "return_tokens_as_token_ids", "return_token_ids"),
    *("response_format", "structured_outputs", "thinking_token_budget", "watermarking", "vllm_xargs"),
    *("echo", "add_special_tokens", "truncate_prompt_tokens", "truncation_side", "cache_salt", "priority"),
    *("request_id", "session_id", "stream_interval", "kv_transfer_params", "ec_transfer_params"),
    *("mm_payload", "return_mm_kwargs", "return_token_offsets", "routed_experts_prompt_start"),
}
_COMPLETION: Final = frozenset(_BOTH | {"prompt", "prompt_embeds", "suffix"})
_CHAT: Final = frozenset(
    _BOTH
    | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
    | {"chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"}
    | {"reasoning_effort", "include_reasoning", "media_io_kwargs", "mm_processor_kwargs", "return_prompt_text"}
)
# With one of these, vLLM renders or reads a chat in a way that the daemon does not know.
_OF_CHATS: Final = ("--chat-template", "--default-chat-template-kwargs", "--reasoning-parser", "--response-role")


def own_server(args: Sequence[str]) -> OwnServer:
    """Return what vLLM's server does when it is started with ``args``."""
    flags = [argument.partition("=")[0].partition(".")[0].replace("_", "-") for argument in args]
    return OwnServer(
        completion_parameters=_COMPLETION,
        chat_parameters=_CHAT,
        every_chat=next((flag for flag in flags if flag in _OF_CHATS), ""),
    )
