"""The daemon's side of SGLang: starts it as a supervised child, feeds it requests, notices when it dies or hangs."""

import asyncio
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from engines.errors import EngineError, EngineStartFailed, InvalidRequest
from engines.outliving import Outliving
from engines.protocol import EngineCapabilities, FinishReason, GenerationRequest, TokenChunk
from engines.served.adopting import AdoptedServer
from engines.served.channel import Channel, Message
from engines.served.connecting import await_ranks, first_contact, read_hub_token
from engines.served.engine import ServedEngine
from engines.served.group import members_of
from engines.served.kind import ServedSetup
from engines.served.logs import LogLine
from engines.served.options import handover_setup
from engines.served.run_directory import HTTP_SOCKET
from engines.served.sampling import tokens_left
from engines.served.server import EngineServer
from engines.served.streams import Stream
from engines.sglang.command import KEYS_FILE, command_line, environment
from engines.sglang.http import Event, HttpFailed, Refused, RequestFailed, SglangHttp
from engines.sglang.interpreter import sglang_version
from engines.sglang.logs import DIALECT
from engines.sglang.options import SglangOptions, num_kv_tokens
from engines.sglang.own_server import own_server
from engines.sglang.pipelining import ensure_no_pipeline_of_vectors
from engines.sglang.sampling import ENGINE_PARAMS, parameter_of, to_sglang
from engines.validation import check_request
from planner.layout import Pipeline
from planner.model_graph import ModelGraph

_LISTENER: Final = "SGLang's scheduler of rank 0"
_DEATH_WAIT_S: Final = 1.0  # a connection that breaks is the first sign of a death, which is about to be noticed
_BAD_REQUEST: Final = 400
_FINISH: Final = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


def _ignore(_news: object) -> None:
    pass


class SglangEngine(ServedEngine):
    """An ``Engine`` that is an SGLang of its own environment."""

    def __init__(
        self,
        options: SglangOptions,
        pipeline: Pipeline,
        *,
        epoch: int = 0,
        graph: ModelGraph | None = None,
        on_log: Callable[[LogLine], None] = _ignore,
        outliving: Outliving | AdoptedServer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            _setup(options), pipeline, epoch=epoch, graph=graph, on_log=on_log, outliving=outliving, clock=clock
        )
        self._options = options
        known = {} if self._adopted is None else self._adopted.memo.secrets
        self._key = known.get("key") or secrets.token_hex(32)  # no "-" in front
        self._admin_key = known.get("admin_key") or secrets.token_hex(32)
        self._http: SglangHttp | None = None
        self._work: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self._life.ensure()
        check_request(request, self.capabilities)  # an id that is not in the vocabulary would end SGLang
        left = tokens_left(request, self.capabilities)
        if left <= 0:
            yield TokenChunk(token_ids=(), finish_reason=FinishReason.LENGTH)
            return
        sampling = to_sglang(request, max_tokens=left)
        self._last_key += 1
        key, stream, rid = self._last_key, Stream(), f"flexpiped-{self._last_key}-{secrets.token_hex(4)}"
        body = {
            "rid": rid,
            "input_ids": [*request.prompt_token_ids, *request.generated_token_ids],
            "sampling_params": sampling,
            "return_logprob": request.sampling.logprobs,
            "stream": True,
        }
        self._streams[key] = stream
        stops = frozenset(request.sampling.stop_token_ids if request.sampling.ignore_eos else ())
        feeding = asyncio.create_task(self._feed(stream, body, stops), name="sglang-request")
        self._keep(feeding)
        try:
            async for chunk in stream:
                yield chunk
        finally:
            del self._streams[key]
            if not feeding.done():
                feeding.cancel()
                self._abort(rid)

    async def close(self) -> None:
        await super().close()
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    # --- OwnRoutes ---

    @property
    def own_routes_key(self) -> str:
        return self._key

    # --- beyond the protocol: for benchmarks and tests ---

    @property
    def options(self) -> SglangOptions:
        return self._options

    @property
    def admin_key(self) -> str:
        """What those of its routes ask for that only the daemon may use."""
        return self._admin_key

    # --- requests ---

    async def _feed(self, stream: Stream, body: dict[str, Any], stops: frozenset[int]) -> None:
        """Have SGLang run a request, and put what comes into ``stream``."""
        assert self._http is not None
        try:
            async for event in self._http.generate(body):
                self._watch.progressed()
                put(stream, event, stops)
                if event.finish:
                    return
            raise HttpFailed("the answer has no end")
        except Refused as refusal:
            stream.fail(InvalidRequest(str(refusal), parameter=parameter_of(str(refusal))))
        except RequestFailed as error:
            stream.fail(EngineError(str(error)))
        except HttpFailed as error:
            await self._fail(stream, error)

    async def _fail(self, stream: Stream, error: HttpFailed) -> None:
        """A connection broke. So does each when SGLang dies; what it died of is known in a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DEATH_WAIT_S):
                await self.died()
        self._note_death(f"SGLang's API server broke a connection: {error}")
        stream.fail(self._life.end or EngineError(str(error)))

    def _abort(self, rid: str) -> None:
        if self._life.end is None and self._http is not None:
            self._keep(asyncio.create_task(self._http.abort(rid), name="sglang-abort"))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    # --- what SGLang adds to the common part ---

    async def _version(self) -> str:
        return await sglang_version(self._options.python)

    async def _launch(self, server: EngineServer, counts: Sequence[int]) -> None:
        options, directory = self._options, server.run_directory
        _write_keys(directory / KEYS_FILE, key=self._key, admin_key=self._admin_key)
        env = environment(
            options,
            counts=counts,
            run_dir=directory,
            inherited=os.environ,
            daemon_prefix=sys.prefix,
            cores=sorted(os.sched_getaffinity(0)),
            hf_token=await asyncio.to_thread(read_hub_token, options.hf_token_file),
        )
        command = command_line(options, counts=counts, run_dir=directory, port=_free_port())
        await server.spawn(options.python, command, env)

    async def _contact(self, server: EngineServer) -> tuple[Channel, Message]:
        channel, info = await first_contact(server.run_directory, on_message=lambda _news: None, closed_by=_LISTENER)
        try:
            self._http = SglangHttp(server.run_directory / HTTP_SOCKET, key=self._key, admin_key=self._admin_key)
            await self._http.until_ready()
            (server.run_directory / KEYS_FILE).unlink(missing_ok=True)
            if self.is_adopted:  # requests of the daemon before may not have noticed that it is gone
                await self._http.abort_all()
            else:
                await self._http.freeze_garbage()
            info["pids"] = await self._find_processes(server)
            ensure_room(self._options, info)
            ensure_no_pipeline_of_vectors(info)
        except BaseException:
            await channel.close()
            raise
        return channel, info

    def _secrets(self) -> dict[str, str]:
        return {"key": self._key, "admin_key": self._admin_key}

    def _processes(self) -> list[tuple[int, str]]:
        pids = self.info["pids"]
        ranks = [(pid, f"SGLang's scheduler of rank {rank}") for rank, pid in enumerate(pids["workers"])]
        return [*ranks, *((pid, "SGLang's detokenizer") for pid in pids["detokenizers"])]

    def _take_over(self) -> EngineCapabilities:
        info = self.info
        return EngineCapabilities(
            name="sglang",
            max_model_len=min(info["max_model_len"], self._options.max_model_len or info["max_model_len"]),
            vocab_size=info["vocab_size"],
            eos_token_ids=tuple(info["eos_token_ids"]),
            refactors_in_place=not info["refactor_refusal"] and self._graph is not None,
            max_stages=self._ranks.count,
            tensor_parallel=True,
            generates=info.get("generates", True),  # an adopted engine may have a plugin that does not say
            resumes_seeded=info.get("resumes_seeded", True),
            engine_params=ENGINE_PARAMS,
            own_server=own_server(self._options.args),
            caches_prefixes="--disable-radix-cache" not in self._options.args,
            kv_refusal=info["kv_refusal"],
            resident=tuple(self._ranks.devices_of(rank) for rank in range(self._ranks.count)),
        )

    async def _find_processes(self, server: EngineServer) -> dict[str, Any]:
        """Return process ids: of the API server, of schedulers and their helpers by rank, of detokenizers."""
        # A rank may come to its loop after the first one serves: forgotten, it would be missing in each handover.
        sides = await await_ranks(server.run_directory, count=len(self._options.device_ids))
        try:
            ranks = [await sides[rank].call("status") for rank in sorted(sides)]
        finally:
            for side in sides.values():
                await side.close()
        members = members_of(server.pid)
        return {
            "api": server.pid,
            "workers": [rank["pid"] for rank in ranks],
            "helpers": [pid for rank in ranks for pid in rank.get("helper_pids", ())],
            "detokenizers": [pid for pid in members if _title_of(pid).startswith("sglang::detoken")],
        }


def put(stream: Stream, event: Event, stops: frozenset[int]) -> None:
    """Put what came into the stream; a stop token among it ends it there.

    SGLang knows nothing of that token, so it goes on until the request's abort reaches it.
    """
    if stream.ended:
        return
    end = next((index + 1 for index, token in enumerate(event.token_ids) if token in stops), None)
    if end is not None:
        stream.add(event.token_ids[:end], event.logprobs[:end], FinishReason.STOP)
    elif event.finish == "abort" and event.status == _BAD_REQUEST:
        stream.fail(InvalidRequest(event.reason, parameter=parameter_of(event.reason)))
    else:
        finish = _FINISH.get(event.finish, FinishReason.ABORT) if event.finish else None
        stream.add(event.token_ids, event.logprobs, finish)


def ensure_room(options: SglangOptions, info: Message) -> None:
    """Return when SGLang has the KV cache that it was told to have: of less, where memory is short, it says nothing.

    Raises:
        EngineStartFailed
    """
    wanted, given = num_kv_tokens(options), info["num_kv_blocks"] * info["kv_block_tokens"]
    if given < wanted:
        raise EngineStartFailed(
            f"engines.sglang.kv_cache: there is memory for {given} tokens of KV cache, {wanted} are asked for"
        )


def _write_keys(path: Path, *, key: str, admin_key: str) -> None:
    path.touch(mode=0o600)
    path.write_text(f'api-key: "{key}"\nadmin-api-key: "{admin_key}"\n')


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def _setup(options: SglangOptions) -> ServedSetup:
    return ServedSetup(
        name="SGLang",
        listener=_LISTENER,
        dialect=DIALECT,
        handover=handover_setup(options, kv_capacity_blocks=num_kv_tokens(options) // options.kv_block_tokens),
        start_deadline_s=options.start_deadline_s,
        hang_deadline_s=options.hang_deadline_s,
    )
