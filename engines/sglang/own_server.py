"""What SGLang's own OpenAI server knows, by name. Pure.

The names are the fields of SGLang 0.5.23's request models. SGLang ignores a name that it does not know, so one that is
missing here is refused by the daemon and never lost in silence; a test compares them with the SGLang that runs.
"""

from collections.abc import Sequence
from typing import Final

from engines.offers import OwnServer

_BOTH: Final = {
    *("model", "stream", "stream_options", "user", "n", "max_tokens", "seed", "stop", "stop_token_ids", "stop_regex"),
    *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "no_stop_trim", "skip_special_tokens", "logit_bias", "logprobs"),
    *("response_format", "regex", "ebnf", "custom_params", "custom_logit_processor", "watermark"),
    *("return_cached_tokens_details", "return_hidden_states", "return_routed_experts", "return_spec_tokens_details"),
    *("return_token_ids", "routed_experts_start_len", "lora_path", "session_id", "session_params", "cache_salt"),
    *("extra_key", "priority", "rid", "images_config", "mm_processor_kwargs"),
}
_COMPLETION: Final = frozenset(_BOTH | {"prompt", "best_of", "echo", "suffix", "json_schema", "custom_labels"})
_CHAT: Final = frozenset(
    _BOTH
    | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "input_ids"}
    | {"chat_template_kwargs", "continue_final_message", "reasoning_effort", "separate_reasoning", "stream_reasoning"}
    | {"thinking", "task", "min_dynamic_patch", "max_dynamic_patch", "use_audio_in_video", "video_config"}
    | {"return_prompt_token_ids", "return_input_ids_in_sglext", "return_output_ids_in_sglext", "return_meta_info"}
    | {"return_sampling_mask", "sampling_logprobs_mode"}
    | {"return_flat_raw_output_top_logprobs", "return_flat_raw_top_logprobs_b64"}
)
# Which of several instances that share the work is to have a request: there is one here, so they are refused by name.
ELSEWHERE: Final = frozenset(
    {"bootstrap_host", "bootstrap_port", "bootstrap_room", "disagg_prefill_dp_rank", "routed_dp_rank"}
    | {"data_parallel_rank"}
)
_PROMPTS: Final = frozenset({"prompt", "input", "query", "items"})
# Of stop tokens, those that ``min_tokens`` holds back are looked up. The ids of ``logit_bias`` it checks itself.
_TOKEN_IDS: Final = _PROMPTS | {"input_ids", "stop_token_ids", "label_token_ids"}
# With one of these, SGLang renders or reads a chat in a way that the daemon does not know.
_OF_CHATS: Final = (
    "--chat-template",
    "--hf-chat-template-name",
    "--default-chat-template-kwargs",
    "--reasoning-parser",
)


def own_server(args: Sequence[str]) -> OwnServer:
    """Return what SGLang's server does when it is started with ``args``."""
    flags = [argument.partition("=")[0].replace("_", "-") for argument in args]
    return OwnServer(
        completion_parameters=_COMPLETION,
        chat_parameters=_CHAT,
        every_chat=next((flag for flag in flags if flag in _OF_CHATS), ""),
        token_id_names=_TOKEN_IDS,
        prompt_names=_PROMPTS,
        adapter_mark=":",
        tokenizes=False,
    )
