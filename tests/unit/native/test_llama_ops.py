"""The compiled parts of a Llama decoder against transformers' own."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from engines.native.kernels.build import build_kernels
from engines.native.llama_ops import LIKE_LLAMA, LlamaOps, install
from tests.support.family_checkpoints import config_of, noisy_model


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_kernels(directory=tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def ops(library: Path) -> LlamaOps:
    return LlamaOps(library)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (7, 100), (512, 256)])
def test_rms_norm(ops: LlamaOps, tokens: int, size: int) -> None:
    module = LlamaRMSNorm(size, eps=1e-5)
    module.weight.data.normal_()
    hidden = torch.randn(1, tokens, size)
    with torch.inference_mode():
        assert close(ops.rms_norm(module, hidden), module(hidden))


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim"), [(1, 4, 2, 16), (9, 4, 4, 64), (300, 8, 1, 80)])
def test_rotary(ops: LlamaOps, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    q = torch.randn(1, tokens, heads, dim).transpose(1, 2)
    k = torch.randn(1, tokens, kv_heads, dim).transpose(1, 2)
    angles = torch.randn(1, tokens, dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    rotated = ops.rotary(q.clone(), k.clone(), cos, sin)
    assert all(close(a, b) for a, b in zip(rotated, expected, strict=True))


def test_rotary_refuses_a_batch(ops: LlamaOps) -> None:
    q = torch.randn(2, 4, 3, 16)
    with pytest.raises(ValueError, match="one batch"):
        ops.rotary(q, q, torch.ones(2, 3, 16), torch.ones(2, 3, 16))


@pytest.mark.parametrize("tokens", [1, 33])
def test_gated_mlp(ops: LlamaOps, tokens: int) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=172, num_attention_heads=4, hidden_act="silu")
    module = LlamaMLP(config)
    hidden = torch.randn(1, tokens, 64)
    with torch.inference_mode():
        assert close(ops.gated_mlp(module, hidden), module(hidden))


def test_rows_do_not_depend_on_the_batch(ops: LlamaOps) -> None:
    """Bit for bit: what decides whether a recomputed token is the same one."""
    module = LlamaRMSNorm(100)
    hidden = torch.randn(1, 40, 100)
    with torch.inference_mode():
        together = ops.rms_norm(module, hidden)
        assert all(torch.equal(ops.rms_norm(module, hidden[:, i : i + 1])[0, 0], together[0, i]) for i in range(40))


@pytest.mark.parametrize("kind", sorted(LIKE_LLAMA))
def test_families_like_llama_compute_the_same_with_the_compiled_parts(
    kind: str, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    model = noisy_model(config_of(kind)).eval()
    modeling = sys.modules[type(model).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)  # what it is now comes back
    tokens = torch.arange(20, 60)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        install(model, library)
        assert isinstance(model.model.norm.forward, partial)
        assert torch.allclose(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)


def test_other_families_keep_their_own() -> None:
    model = noisy_model(config_of("gemma2"))
    install(model, Path("no library is loaded for it"))
    assert not isinstance(model.model.norm.forward, partial)


def test_the_source_is_shipped() -> None:
    assert (Path(__file__).parents[3] / "engines/native/kernels/llama_ops.c").is_file()
