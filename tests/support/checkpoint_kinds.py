"""Small random checkpoints of kinds that only vLLM serves: quantised ones, and one that takes images.

They are written here, number by number, in the formats that people download; no quantisation library is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.support.checkpoints import BOS, EOS, SPECIAL_TOKENS, make

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

    Tensors = dict[str, torch.Tensor]

IMAGE = "<image>"
IMAGE_SIZE: Final = 32  # pixels, either way
IMAGE_TOKENS: Final = 4  # of one image
GROUP: Final = 32  # weights with one scale, where there are four bits for each
_LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_int8_llama(directory: Path) -> Path:
    """Make a Llama with weights and activations of 8 bits, as compressed-tensors writes it."""
    return make(directory, _llama_config(), finish=quantise_to_int8)


def make_gptq_llama(directory: Path) -> Path:
    """Make a Llama with weights of 4 bits, as GPTQ writes it."""
    return make(directory, _llama_config(), finish=quantise_to_gptq)


def make_blip2(directory: Path) -> Path:
    """Make a BLIP-2: an OPT of 8 decoders that sees an image of 32 x 32 pixels as four tokens."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = OPTConfig(
        num_hidden_layers=8,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=352,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=1024,
        init_std=0.15,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(EOS),
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**small, image_size=IMAGE_SIZE, patch_size=8, initializer_range=0.3),
        qformer_config=Blip2QFormerConfig(**small, encoder_hidden_size=64, initializer_range=0.3),
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=len(SPECIAL_TOKENS),
        initializer_range=0.3,
        tie_word_embeddings=False,
        dtype="float32",
    )
    return make(
        directory,
        config,
        model_of=_image_model,
        special_tokens=(*SPECIAL_TOKENS, IMAGE),
        finish=write_processor,
    )


def quantise_to_int8(directory: Path) -> None:
    """Round each row of the linear weights to 8 bits with a scale of its own; activations are rounded as they come."""

    import torch

    def rounded(name: str, weight: torch.Tensor) -> Tensors:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return {
            f"{name}.weight": (weight / scale).round().to(torch.int8),
            f"{name}.weight_scale": scale.to(torch.bfloat16),
        }

    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    _rewrite(
        directory,
        rounded,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    )


def quantise_to_gptq(directory: Path) -> None:
    """Round the linear weights to 4 bits, symmetric, in groups; eight of them are packed into a word, inputs first."""

    import torch

    def rounded(name: str, weight: torch.Tensor) -> Tensors:
        outputs, inputs = weight.shape
        by_group = weight.t().reshape(inputs // GROUP, GROUP, -1)
        scale = by_group.abs().amax(dim=1, keepdim=True) / 7
        numbers = ((by_group / scale).round().clamp(-8, 7) + 8).reshape(inputs, -1).to(torch.int64)
        shifts = torch.arange(8, dtype=torch.int64)[None, :, None] * 4
        packed = (numbers.reshape(inputs // 8, 8, -1) << shifts).sum(dim=1)
        return {
            f"{name}.qweight": packed.to(torch.uint32).view(torch.int32),
            f"{name}.qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
            f"{name}.scales": scale.squeeze(1).to(torch.bfloat16),
            f"{name}.g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
        }

    _rewrite(
        directory,
        rounded,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
    )


def write_processor(directory: Path) -> None:
    """Write how an image becomes pixels and tokens, as BLIP-2's processor reads it."""
    of_images = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    whole = {"processor_class": "Blip2Processor", "num_query_tokens": IMAGE_TOKENS}
    (directory / "preprocessor_config.json").write_text(json.dumps({**of_images, "processor_class": "Blip2Processor"}))
    (directory / "processor_config.json").write_text(json.dumps(whole))


def _llama_config() -> LlamaConfig:
    """Return a Llama of 8 decoders whose sizes suit vLLM's CPU kernels."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=8,
        hidden_size=128,
        intermediate_size=352,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=2048,
        initializer_range=0.15,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )


def _image_model(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForImageTextToText

    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)  # type: ignore[no-untyped-call]
    return model


def _rewrite(
    directory: Path, rounded: Callable[[str, torch.Tensor], Tensors], quantisation: Mapping[str, object]
) -> None:
    """Put rounded weights in the place of the linear ones, and what they mean into config.json."""
    from safetensors.torch import load_file, save_file

    file, config = directory / "model.safetensors", directory / "config.json"
    tensors: Tensors = {}
    for name, tensor in load_file(file).items():
        layer, _, part = name.rpartition(".")
        if part == "weight" and layer.endswith(_LINEAR):
            tensors |= rounded(layer, tensor.float())
        else:
            tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantisation}, indent=2))
