"""What is read of a LoRA adapter, what is refused by name, and that each token gets what its adapter adds."""

import json
import os
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
from engines.native.lora import Adapter, LoraModules
from engines.native.lora_files import files_in, read_adapter
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
    lora = LoraModules([read_adapter(files_in("a", str(adapter)), family_of(directory))], model)
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
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj is of rank 8 by adapter_config.json, which \[4, 32\] and \[32, 4\]"),
        ({"alpha_pattern": {"q_proj[": 8}}, "unterminated character set"),
        ({"r": 0}, "of rank 0"),
        ({"r": 8}, "of rank 8"),
        ({"r": None}, "Expected `int`, got `null`"),
        ({"lora_alpha": None}, "Expected `float`, got `null`"),
        ({"lora_alpha": 1e60}, "values that are not finite in float32"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config: dict[str, object], words: str, tmp_path: Path) -> None:
    directory = make_family("llama")
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=("q_proj",), **config)
    with pytest.raises(UnsupportedByEngine, match=words):
        read_adapter(files_in("a", str(adapter)), family_of(directory))


PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 6}, (1.5, 1.5, 1.5)),
        ({"lora_alpha": 6, "use_rslora": True}, (3.0, 3.0, 3.0)),
        ({"lora_alpha": 6, "alpha_pattern": {"q_proj": 8, "up_proj": 2.0}}, (2.0, 2.0, 0.5)),
        ({"lora_alpha": 6, "alpha_pattern": {"layers.1.self_attn.q_proj": 8}}, (1.5, 2.0, 1.5)),
        ({"lora_alpha": 6, "alpha_pattern": {r"^model\.layers\.1\..*": 8}}, (1.5, 2.0, 2.0)),
        ({"lora_alpha": 6, "alpha_pattern": {"proj": 8}}, (1.5, 1.5, 1.5)),  # the end of a name is not one of a path
        ({"lora_alpha": 6, "r": 64, "rank_pattern": {"q_proj": 4, ".*up_proj": 4}}, (1.5, 1.5, 1.5)),
    ],
)
def test_each_module_has_its_own_scale(config: dict[str, object], scales: tuple[float, ...], tmp_path: Path) -> None:
    directory = make_family("llama")
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=("q_proj", "up_proj"), **config)
    stored = load_file(adapter / "adapter_model.safetensors")
    read = read_adapter(files_in("a", str(adapter)), family_of(directory))
    for path, scale in zip(PATHS, scales, strict=True):
        assert torch.equal(read.pairs[path][1], scale * stored[f"base_model.model.{path}.lora_B.weight"].T)


def test_what_was_read_stays_when_its_file_is_written_over(tmp_path: Path) -> None:
    """Of rank 1 both halves are laid out in the file as in memory."""
    directory = make_family("llama")
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=("q_proj",), rank=1)
    file = adapter / "adapter_model.safetensors"
    stored = {name: each.clone() for name, each in load_file(file).items()}
    pairs = read_adapter(files_in("a", str(adapter)), family_of(directory)).pairs
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    for path, (down, _) in pairs.items():
        assert torch.equal(down, stored[f"base_model.model.{path}.lora_A.weight"].T)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"peft_type": "LORA"}', "\x00"])
def test_a_configuration_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    directory = make_family("llama")
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=("q_proj",))
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UnsupportedByEngine, match="adapter 'a' in "):
        read_adapter(files_in("a", str(adapter)), family_of(directory))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", of=make_family("llama"), seed=1, targets=("q_proj",))
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedByEngine, match=r"it has adapter_model\.bin"):
        files_in("a", str(adapter))
    os.mkfifo(weights)
    with pytest.raises(UnsupportedByEngine, match="it has adapter_model"):
        files_in("a", str(adapter))
    with pytest.raises(UnsupportedByEngine, match="too long"):
        files_in("a", "x" * 5000)


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = make_family("llama")
    adapter = make_adapter(tmp_path / "a", of=directory, seed=1, targets=("q_proj",))
    family, tensors = family_of(directory), load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changed = {
        "do not fit": tensors | {key: tensors[key][:, :-1].contiguous()},
        "which \\[\\] and \\[32, 4\\] do not fit": tensors | {key: torch.tensor(1.0)},
        "which \\[32\\] and": tensors | {key: torch.ones(32)},
        "which \\[4, 32, 1\\] and": tensors | {key: torch.ones(4, 32, 1)},
        "values of types torch.int8": {name: each.to(torch.int8) for name, each in tensors.items()},
        "values that are not finite": tensors | {key: torch.full((4, 32), torch.nan)},
        "has no tensors": {},
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
            read_adapter(files_in("a", str(adapter)), family)


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    family = family_of(make_family("llama"))
    with pytest.raises(UnsupportedByEngine, match=r"adapter 'a' in .*/nothing: there is no such directory"):
        read_adapter(files_in("a", str(tmp_path / "nothing")), family)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    (tmp_path / "adapter_model.safetensors").write_text("nonsense")
    with pytest.raises(UnsupportedByEngine, match=r"adapter_model\.safetensors"):
        read_adapter(files_in("a", str(tmp_path)), family)
