"""What is left to do of a request. Pure."""

from engines.protocol import EngineCapabilities, GenerationRequest


def tokens_left(request: GenerationRequest, capabilities: EngineCapabilities) -> int:
    """Return how many tokens the request may still get: none where it is complete."""
    done = len(request.generated_token_ids)
    room = capabilities.max_model_len - len(request.prompt_token_ids) - done
    return min(request.sampling.max_tokens - done, room)
