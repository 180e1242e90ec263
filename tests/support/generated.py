"""What transformers' own ``generate`` says, on the CPU: the reference of the native engine."""

from pathlib import Path


def generated_by_transformers(directory: Path, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """Return exactly ``max_tokens`` greedy tokens after ``prompt``."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.tensor([prompt])
    options = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids
