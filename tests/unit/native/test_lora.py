"""What is read of a LoRA adapter, what is refused by name, and that each token gets what its adapter adds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engines.errors import UnsupportedByEngine
from engines.native.families import build_family
from engines.native.family import Family
from engines.native.lora import Adapter, LoraModules, read_adapter
from tests.support.adapters import make_adapter, merged
from tests.support.family_checkpoints import make_family

TARGETS = {
    "llama": ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc", "c_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "opt": ("q_proj", "fc1", "fc2"),
}


def family_of(directory: Path) -> Family:
    config = AutoConfig.from_pretrained(directory)
    return build_family(config, attention="eager", max_model_len=32, dtype=torch.float32)


def numbers(*of_sequences: int) -> bytes:
    return np.array(of_sequences, dtype=np.int32).tobytes()


def counts(*of_sequences: int) -> Any:
    return np.array(of_sequences, dtype=np.int32)


@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_what_is_added_is_what_the_merged_weights_make(kind: str, tmp_path: Path) -> None:
    directory = make_family(kind)
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=TARGETS[kind])
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lora = LoraModules([read_adapter("a", adapter, family_of(directory))], model)
    tokens = torch.arange(20, 40)[None]
    with torch.inference_mode():
        alone = model(tokens).logits
        lora.begin(numbers(1), counts(20))
        adapted = model(tokens).logits
        lora.end()
        assert torch.equal(model(tokens).logits, alone)
        expected = merged(directory, adapter)(tokens).logits
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=1e-4)
    assert (expected - alone).abs().max() > 0.1


def test_each_token_gets_what_its_adapter_adds_and_others_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    pairs = [(torch.randn(3, 1), torch.randn(1, 2)) for _ in range(2)]
    lora = LoraModules([Adapter(name=str(i), pairs={"0": pair}) for i, pair in enumerate(pairs)], model)
    given = torch.randn(1, 6, 3)
    plain = model(given)
    lora.begin(numbers(2, 0, 1), counts(1, 2, 3))
    adapted = model(given)
    added = (adapted - plain)[0]
    for token, pair in ((0, pairs[1]), (3, pairs[0]), (4, pairs[0]), (5, pairs[0])):
        torch.testing.assert_close(added[token], given[0, token] @ pair[0] @ pair[1])
    assert torch.equal(added[1:3], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is not supported"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config: dict[str, object], words: str, tmp_path: Path) -> None:
    directory = make_family("llama")
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=("q_proj",), **config)
    with pytest.raises(UnsupportedByEngine, match=words):
        read_adapter("a", adapter, family_of(directory))


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = make_family("llama")
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=("q_proj",))
    family, tensors = family_of(directory), load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changed = {
        "do not fit": tensors | {key: tensors[key][:, :-1].contiguous()},
        "half of a pair": {name: each for name, each in tensors.items() if name != key},
        "has no module": {name.replace("layers.0", "layers.77"): each for name, each in tensors.items()},
        "only linear modules of decoders": {
            f"base_model.model.lm_head.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"
        },
        "none of a LoRA adapter": {"base_model.model.model.layers.0.magnitude": torch.zeros(4)},
        "RMSNorm, which is not supported": {
            f"base_model.model.model.layers.0.input_layernorm.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"
        },
    }
    for words, kept in changed.items():
        save_file(kept, adapter / "adapter_model.safetensors")
        with pytest.raises(UnsupportedByEngine, match=words):
            read_adapter("a", adapter, family)


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    family = family_of(make_family("llama"))
    with pytest.raises(UnsupportedByEngine, match=r"adapter 'a' in .*/nothing: there is no such directory"):
        read_adapter("a", tmp_path / "nothing", family)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_text("nonsense")
    with pytest.raises(UnsupportedByEngine, match=r"adapter_model\.safetensors"):
        read_adapter("a", tmp_path, family)
