"""LoRA adapters with random weights, as peft saves them, and what transformers says with one merged into a model."""

import json
from pathlib import Path
from typing import Any

SCALE = 2.0  # lora_alpha / r
_RANK = 4


def make_adapter(
    directory: Path, *, of: Path, seed: int, targets: tuple[str, ...], rank: int = _RANK, **config: object
) -> Path:
    """Write an adapter for the modules of these names in every decoder of a checkpoint."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in _model(of).named_modules():
        if path.rpartition(".")[2] in targets:
            given, taken = module.weight.shape if type(module).__name__ != "Conv1D" else module.weight.shape[::-1]
            down, up = torch.randn(rank, taken, generator=draw), torch.randn(given, rank, generator=draw)
            tensors[f"base_model.model.{path}.lora_A.weight"] = down / taken**0.5
            tensors[f"base_model.model.{path}.lora_B.weight"] = 0.15 * up
    assert tensors, "no module of these names"
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": SCALE * rank, "bias": "none", "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(known | config))
    return directory


def merged(directory: Path, adapter: Path | None) -> Any:
    """Return transformers' model, with an adapter in its weights, in float32."""
    from safetensors.torch import load_file

    model = _model(directory)
    if adapter is None:
        return model
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            up = tensors[key.replace(".lora_A.", ".lora_B.")]
            module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            change = SCALE * up @ down
            module.weight.data += change.T if type(module).__name__ == "Conv1D" else change
    return model


def generated(model: Any, prompt: tuple[int, ...], *, max_tokens: int) -> list[int]:
    """Return what it generates, greedily."""
    import torch

    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def logprobs_of(model: Any, prompt: tuple[int, ...], output: list[int]) -> list[float]:
    """Return the log-probability of each token of an output, given all before it."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    found: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None]).flatten().tolist()
    return found


def _model(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
