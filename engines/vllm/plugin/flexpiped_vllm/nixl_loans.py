"""A running request's KV cache goes to another vLLM by NIXL, with vLLM's own pull connector on both sides.

    lend:   a request of the same tokens, for one token more, ends here at once: its KV blocks are in the prefix cache.
            vLLM keeps them until they have been read, or until its lease on them has run out.
    borrow: a request of the same tokens, for one token more, reads them there. It leaves whole KV blocks in the prefix
            cache here, and the request that comes later finds them as those of any prompt.

The request itself runs on meanwhile, and neither it nor vLLM's scheduler knows of this.
"""

from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from flexpiped_vllm.internals import RequestOutputKind, SamplingParams


class NixlLoans:
    """One API server's.

    Args:
        generate: The engine's, which yields outputs.
        call_core: Calls a method that our plugin added to the engine core.
        name: By which the engine's requests begin.
    """

    def __init__(self, generate: Any, call_core: Callable[..., Awaitable[Any]], *, name: str) -> None:
        self._generate = generate
        self._call_core = call_core
        self._names = (f"{name}-loan-{number}" for number in count(1))

    async def lend(self, request: str) -> dict[str, Any]:
        """Return the tokens of a running request that have been computed, and how another vLLM gets their KV cache.

        Raises:
            RuntimeError: There is nothing to lend.
        """
        found = await self._call_core("flexpiped_kv_tokens", request)
        lent = await self._one_token(found["tokens"], {"do_remote_decode": True, "do_remote_prefill": False})
        if not lent.kv_transfer_params:
            raise RuntimeError("vLLM's connector lends nothing of it")
        return {**found, "params": lent.kv_transfer_params}

    async def borrow(self, tokens: list[int], params: dict[str, Any]) -> dict[str, Any]:
        """Have the KV cache of these tokens here.

        Raises:
            RuntimeError: It could not be read.
        """
        read = await self._one_token(tokens, params)
        return {"cached_tokens": read.num_cached_tokens or 0}

    async def _one_token(self, tokens: list[int], params: dict[str, Any]) -> Any:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": params},
        )
        last = None
        async for output in self._generate({"type": "token", "prompt_token_ids": tokens}, sampling, next(self._names)):
            last = output
        reason = last.outputs[0].finish_reason if last is not None and last.outputs else "nothing"
        if reason != "length":
            raise RuntimeError(f"vLLM's NIXL connector could not transfer it: the request ended with {reason}")
        return last
