"""The daemon's side of vLLM: starts it as a supervised child, feeds it requests, notices when it dies or hangs."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from engines.errors import InvalidRequest
from engines.offers import KvParcel
from engines.outliving import Outliving
from engines.process import usable_cores
from engines.protocol import EngineCapabilities, FinishReason, GenerationRequest, TokenChunk
from engines.served.adopting import AdoptedServer
from engines.served.channel import Channel, Message
from engines.served.connecting import first_contact, read_hub_token
from engines.served.engine import ServedEngine
from engines.served.kind import ServedSetup
from engines.served.logs import LogLine
from engines.served.options import handover_setup
from engines.served.sampling import tokens_left
from engines.served.server import EngineServer
from engines.served.streams import Stream
from engines.validation import check_request
from engines.vllm.command import command_line, environment
from engines.vllm.interpreter import vllm_version
from engines.vllm.kv_loans import VllmKvLoans
from engines.vllm.kv_parcels import VllmKvParcels
from engines.vllm.logs import DIALECT
from engines.vllm.options import VllmOptions, num_kv_blocks
from engines.vllm.own_server import own_server
from engines.vllm.recompile import Recompilation, Recompiler
from engines.vllm.sampling import ENGINE_PARAMS, to_vllm
from planner.layout import Pipeline
from planner.model_graph import ModelGraph

_LISTENER: Final = "vLLM's API server"


def _ignore(_news: object) -> None:
    pass


class VllmEngine(ServedEngine):
    """An ``Engine`` that is a vLLM of its own environment.

    Args:
        on_recompiled: Told after a move in compiled mode how the return to compiled code ended.
    """

    def __init__(
        self,
        options: VllmOptions,
        pipeline: Pipeline,
        *,
        epoch: int = 0,
        graph: ModelGraph | None = None,
        on_log: Callable[[LogLine], None] = _ignore,
        on_recompiled: Callable[[Recompilation], None] = _ignore,
        outliving: Outliving | AdoptedServer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            _setup(options), pipeline, epoch=epoch, graph=graph, on_log=on_log, outliving=outliving, clock=clock
        )
        self._options = options
        self.on_recompiled = on_recompiled
        self._recompiler: Recompiler | None = None
        self._key_of: dict[str, int] = {}  # of requests that run, by their id
        self._parcels: VllmKvParcels | VllmKvLoans | None = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self._life.ensure()
        check_request(request, self.capabilities)
        left = tokens_left(request, self.capabilities)
        if left <= 0:
            yield TokenChunk(token_ids=(), finish_reason=FinishReason.LENGTH)
            return
        sampling = to_vllm(request, max_tokens=left)
        self._last_key += 1
        key, stream = self._last_key, Stream()
        self._streams[key] = stream
        self._key_of[request.request_id] = key
        prompt = [*request.prompt_token_ids, *request.generated_token_ids]
        self._ready_link().send({"op": "generate", "key": key, "prompt": prompt, "sampling": sampling})
        try:
            async for chunk in stream:
                yield chunk
        finally:
            del self._streams[key]
            if self._key_of.get(request.request_id) == key:
                del self._key_of[request.request_id]
            if not stream.ended and self._life.end is None:
                self._ready_link().send({"op": "abort", "key": key})

    # --- OwnRoutes ---

    @property
    def own_routes_key(self) -> str:
        return ""  # one among engines.vllm.args is the clients' to know

    # --- KvTransfers ---

    async def export_kv(self, request_id: str) -> KvParcel:
        return await self._ready_parcels().export(request_id)

    async def accept_kv(self, parcel: KvParcel) -> None:
        await self._ready_parcels().accept(parcel)

    async def forget_kv(self, parcel: KvParcel) -> None:
        if self._parcels is not None:
            await self._parcels.forget(parcel)

    # --- beyond the protocol: for benchmarks and tests ---

    @property
    def options(self) -> VllmOptions:
        return self._options

    async def recompiled(self) -> None:
        """Return when no return to compiled code is under way."""
        if self._recompiler is not None:
            await self._recompiler.wait()

    # --- what vLLM adds to the common part ---

    async def _version(self) -> str:
        return await vllm_version(self._options.python)

    async def _launch(self, server: EngineServer, counts: Sequence[int]) -> None:
        options = self._options
        env = environment(
            options,
            counts=counts,
            run_dir=server.run_directory,
            inherited=os.environ,
            daemon_prefix=sys.prefix,
            cores=usable_cores(),
            hf_token=await asyncio.to_thread(read_hub_token, options.hf_token_file),
        )
        command = command_line(options, counts=counts, run_dir=server.run_directory)
        await server.spawn(options.python, command, env)

    async def _contact(self, server: EngineServer) -> tuple[Channel, Message]:
        return await first_contact(server.run_directory, on_message=self._handle, closed_by=_LISTENER)

    def _processes(self) -> list[tuple[int, str]]:
        pids = self.info["pids"]
        workers = [(pid, f"vLLM's worker of rank {rank}") for rank, pid in enumerate(pids["workers"])]
        return [(pids["core"], "vLLM's engine core"), *workers]

    def _after_moves(self) -> Recompiler | None:
        if not self._options.compile:
            return None
        link = self._ready_link()
        self._recompiler = Recompiler(
            link.channel,
            link.sides,
            on_end=self.on_recompiled,
            on_crash=self._note_death,
            deadline_s=self._options.start_deadline_s,
        )
        return self._recompiler

    def _take_over(self) -> EngineCapabilities:
        info, channel = self.info, self._ready_link().channel
        if info.get("kv_by_nixl"):
            self._parcels = VllmKvLoans(channel, name_of=self._name_in_core)
        else:
            self._parcels = VllmKvParcels(channel, run_directory=self.run_directory, name_of=self._name_in_core)
        return EngineCapabilities(
            name="vllm",
            max_model_len=info["max_model_len"],
            vocab_size=info["vocab_size"],
            eos_token_ids=tuple(info["eos_token_ids"]),
            refactors_in_place=not info["refactor_refusal"] and self._graph is not None,
            max_stages=self._ranks.count,
            tensor_parallel=True,
            generates=info.get("generates", True),  # an adopted engine may have a plugin that does not say
            resumes_seeded=False,
            compiles_at_first_use=True,
            engine_params=ENGINE_PARAMS,
            caches_prefixes="--no-enable-prefix-caching" not in self._options.args,
            own_server=own_server(self._options.args),
            kv_form=info.get("kv_form", ""),
            kv_refusal=info.get("kv_refusal", ""),
            resident=tuple(self._ranks.devices_of(rank) for rank in range(self._ranks.count)),
        )

    def _handle(self, message: Message) -> None:
        match message["op"]:
            case "outputs":
                self._watch.progressed()
                for key, tokens, finish, logprobs in message["items"]:
                    if (stream := self._streams.get(key)) is not None:  # else aborted meanwhile
                        stream.add(tokens, logprobs or (), FinishReason(finish) if finish else None)
            case "failed":
                if (stream := self._streams.get(message["key"])) is not None:
                    stream.fail(InvalidRequest(message["message"], parameter=message["parameter"] or "prompt"))
            case "dead":
                self._note_death(f"vLLM's engine core has died: {message['reason']}")
            case _:
                pass

    def _ready_parcels(self) -> VllmKvParcels | VllmKvLoans:
        self._life.ensure()
        assert self._parcels is not None, "valid once start has returned"
        return self._parcels

    def _name_in_core(self, request_id: str) -> str | None:
        """Return what the endpoint plugin calls a request, None when it does not run."""
        key = self._key_of.get(request_id)
        return None if key is None else f"flexpiped-{self.pids['api']}-{key}"


def _setup(options: VllmOptions) -> ServedSetup:
    return ServedSetup(
        name="vLLM",
        listener=_LISTENER,
        dialect=DIALECT,
        handover=handover_setup(options, kv_capacity_blocks=num_kv_blocks(options) - 1),
        start_deadline_s=options.start_deadline_s,
        hang_deadline_s=options.hang_deadline_s,
    )
