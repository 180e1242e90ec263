"""Well-known models: the numbers of their published config.json, and how many parameters they are said to have.

Counts are those of the publisher's safetensors index where there is one; ``source`` says where. Keys are theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    config: Mapping[str, object]
    parameters: int
    source: str


OPT_66B = PublishedModel(
    config={
        "model_type": "opt", "torch_dtype": "float16", "vocab_size": 50272, "hidden_size": 9216, "ffn_dim": 36864,
        "num_hidden_layers": 64, "num_attention_heads": 72, "max_position_embeddings": 2048,
        "word_embed_proj_dim": 9216, "do_layer_norm_before": True,
    },
    parameters=65_719_701_504,
    source="transformers' OPTForCausalLM of huggingface.co/facebook/opt-66b's config.json, which has no safetensors "
    "index; table 1 of Zhang et al., OPT, arXiv 2205.01068 rounds it to 66 B",
)  # fmt: skip
LLAMA_2_7B = PublishedModel(
    config={
        "model_type": "llama", "torch_dtype": "float16", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    parameters=6_738_415_616,
    source="safetensors index of huggingface.co/meta-llama/Llama-2-7b-hf",
)  # fmt: skip
LLAMA_3_70B = PublishedModel(
    config={
        "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    parameters=70_553_706_496,
    source="safetensors index of huggingface.co/meta-llama/Meta-Llama-3-70B",
)  # fmt: skip
QWEN_2_5_72B = PublishedModel(
    config={
        "model_type": "qwen2", "torch_dtype": "bfloat16", "vocab_size": 152064, "hidden_size": 8192,
        "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "sliding_window": 131072, "max_window_layers": 80,
        "use_sliding_window": False, "tie_word_embeddings": False,
    },
    parameters=72_706_203_648,
    source="safetensors index of huggingface.co/Qwen/Qwen2.5-72B",
)  # fmt: skip
MIXTRAL_8X7B = PublishedModel(
    config={
        "model_type": "mixtral", "torch_dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    parameters=46_702_792_704,
    source="safetensors index of huggingface.co/mistralai/Mixtral-8x7B-v0.1",
)  # fmt: skip
QWEN_3_30B_A3B = PublishedModel(
    config={
        "model_type": "qwen3_moe", "torch_dtype": "bfloat16", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "max_position_embeddings": 40960,
        "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": False,
    },
    parameters=30_532_122_624,
    source="safetensors index of huggingface.co/Qwen/Qwen3-30B-A3B",
)  # fmt: skip
GEMMA_2_27B = PublishedModel(
    config={
        "model_type": "gemma2", "torch_dtype": "float32", "vocab_size": 256000, "hidden_size": 4608,
        "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "sliding_window": 4096, "attention_bias": False, "max_position_embeddings": 8192,
    },
    parameters=27_227_128_320,
    source="safetensors index of huggingface.co/google/gemma-2-27b; 1,180 M + 26,047 M in table 1 of arXiv 2408.00118",
)  # fmt: skip
MISTRAL_7B = PublishedModel(
    config={
        "model_type": "mistral", "torch_dtype": "bfloat16", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "sliding_window": 4096,
    },
    parameters=7_241_732_096,
    source="safetensors index of huggingface.co/mistralai/Mistral-7B-v0.1",
)  # fmt: skip
QWEN_3_8B = PublishedModel(
    config={
        "model_type": "qwen3", "torch_dtype": "bfloat16", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "attention_bias": False, "max_position_embeddings": 40960, "tie_word_embeddings": False,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36,
    },
    parameters=8_190_735_360,
    source="safetensors index of huggingface.co/Qwen/Qwen3-8B",
)  # fmt: skip
PHI_3_MINI = PublishedModel(
    config={
        "model_type": "phi3", "torch_dtype": "bfloat16", "vocab_size": 32064, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "sliding_window": 2047, "tie_word_embeddings": False,
    },
    parameters=3_821_079_552,
    source="safetensors index of huggingface.co/microsoft/Phi-3-mini-4k-instruct",
)  # fmt: skip

QWEN_2_5_500M = PublishedModel(
    config={
        "model_type": "qwen2", "torch_dtype": "bfloat16", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 21,
        "use_sliding_window": False, "tie_word_embeddings": True,
    },
    parameters=494_032_768,
    source="safetensors index of huggingface.co/Qwen/Qwen2.5-0.5B-Instruct",
)  # fmt: skip
GEMMA_3_1B = PublishedModel(
    config={
        "model_type": "gemma3_text", "torch_dtype": "bfloat16", "vocab_size": 262144, "hidden_size": 1152,
        "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "sliding_window": 512, "sliding_window_pattern": 6, "max_position_embeddings": 32768,
    },
    parameters=999_885_952,
    source="safetensors index of huggingface.co/google/gemma-3-1b-it",
)  # fmt: skip
GPT_NEOX_20B = PublishedModel(
    config={
        "model_type": "gpt_neox", "torch_dtype": "float16", "vocab_size": 50432, "hidden_size": 6144,
        "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
        "max_position_embeddings": 2048, "rotary_pct": 0.25, "tie_word_embeddings": False,
    },
    parameters=20_554_567_680,
    source="section 3 of Black et al., GPT-NeoX-20B, arXiv 2204.06745",
)  # fmt: skip

PUBLISHED: Mapping[str, PublishedModel] = {
    "OPT-66B": OPT_66B,
    "Llama-2-7B": LLAMA_2_7B,
    "Llama-3-70B": LLAMA_3_70B,
    "Qwen2.5-72B": QWEN_2_5_72B,
    "Mixtral-8x7B": MIXTRAL_8X7B,
    "Qwen3-30B-A3B": QWEN_3_30B_A3B,
    "Gemma-2-27B": GEMMA_2_27B,
    "Mistral-7B": MISTRAL_7B,
    "Qwen3-8B": QWEN_3_8B,
    "Phi-3-mini": PHI_3_MINI,
    "Qwen2.5-0.5B": QWEN_2_5_500M,
    "Gemma-3-1B": GEMMA_3_1B,
    "GPT-NeoX-20B": GPT_NEOX_20B,
}
