"""Has a float32 model on the CPU computed by the kernels, as far as they know its family."""

from pathlib import Path

from engines.native import linear, llama_ops
from engines.native.compiled_decoders import CompiledDecoders, is_like_llama
from engines.native.family import Family


def compile_family(family: Family, library: Path, *, kv_block_tokens: int) -> None:
    """Set ``family`` up, before the first fork, so that every worker has it so.

    All families get the matrix products, and keep their weights in the checkpoint's type; those with parts like Llama's
    get these, and those that are nothing else whole decoders.
    """
    llama_ops.install(family.model, library)
    family.linear = linear.LinearOps(library)
    linear.install(family.model, family.linear)
    if is_like_llama(family, kv_block_tokens=kv_block_tokens):
        family.compiled = CompiledDecoders(library, family)
