"""The token channel: requests come in and tokens go out as JSON lines over a Unix socket in the API server.

It lives in the API server's event loop and speaks to the engine as vLLM's own routes do, without text and HTTP.
"""

import asyncio
import json
import os
import re
from pathlib import Path
from typing import Any

from flexpiped_vllm.internals import EngineDeadError, EngineGenerateError, RequestOutputKind, SamplingParams, VLLMError
from flexpiped_vllm.nixl_loans import NixlLoans
from flexpiped_vllm.settings import Settings

SOCKET = "engine.sock"
_LINE_LIMIT = 64 << 20  # a prompt is one line
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity

_REFUSALS = (VLLMError, ValueError, TypeError, EngineGenerateError)


class EndpointPlugin:
    """What vLLM's API server loads; it adds no route."""

    name = "flexpiped"
    required_tasks = None  # a model that only embeds has a daemon, too

    def attach_router(self, app: Any) -> None:
        """Nothing: the channel is a socket of its own."""

    async def init_state(self, engine_client: Any, _state: Any, _args: Any) -> None:
        """Begin to listen. vLLM calls this when the engine is ready."""
        if Settings.present() and engine_client is not None:
            self._endpoint = Endpoint(engine_client)
            await self._endpoint.listen(Settings.of_environment().directory / SOCKET)


class Endpoint:
    """Serves one connection: the daemon's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._server: asyncio.Server | None = None

    async def listen(self, path: Path) -> None:
        # Under another name first: who finds the socket can connect.
        hidden = path.with_suffix(".new")
        self._server = await asyncio.start_unix_server(self._serve, hidden, limit=_LINE_LIMIT)
        hidden.rename(path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self._engine, writer)
        try:
            await connection.greet()
            while line := await reader.readline():
                connection.take(json.loads(line))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the daemon is gone
        finally:
            connection.close()


class Connection:
    """One daemon's requests and calls. Outputs that come in one turn of the loop leave in one line."""

    def __init__(self, engine: Any, writer: asyncio.StreamWriter) -> None:
        self._engine = engine
        self._writer = writer
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._outputs: list[list[Any]] = []
        self._loans = NixlLoans(engine.generate, self._core, name=f"flexpiped-{os.getpid()}")

    async def greet(self) -> None:
        """Send what the daemon has to know before it asks for anything."""
        self._send({"op": "ready", **await self._info()})

    def take(self, message: dict[str, Any]) -> None:
        """Begin what a message asks for."""
        match message["op"]:
            case "generate":
                key = message["key"]
                work = self._generate(key, message["prompt"], message["sampling"])
                self._requests[key] = asyncio.create_task(work)
            case "abort":
                if (request := self._requests.get(message["key"])) is not None:
                    request.cancel()  # vLLM's generator aborts the request
            case "core":
                self._answer(message["call"], self._core(message["method"], *message.get("args", ())))
            case "kv_lend":
                self._answer(message["call"], self._loans.lend(message["name"]))
            case "kv_borrow":
                self._answer(message["call"], self._loans.borrow(message["tokens"], message["params"]))
            case "info":
                self._answer(message["call"], self._info())
            case op:
                self._send({"op": "reply", "call": message.get("call", 0), "error": f"unknown op {op!r}"})

    def close(self) -> None:
        """End all requests: nobody is left to take their tokens."""
        for task in [*self._requests.values(), *self._calls]:
            task.cancel()
        self._writer.close()

    # --- requests ---

    async def _generate(self, key: int, prompt: list[int], sampling: dict[str, Any]) -> None:
        try:
            await self._stream(key, prompt, sampling)
        except EngineDeadError as error:
            self._send({"op": "dead", "reason": str(error)})
        except _REFUSALS as error:
            self._flush()
            parameter = getattr(error, "parameter", None) or _named_in(str(error), sampling)
            self._send({"op": "failed", "key": key, "message": _message_of(error), "parameter": parameter})
        finally:
            del self._requests[key]

    async def _stream(self, key: int, prompt: list[int], sampling: dict[str, Any]) -> None:
        params = _params(sampling)
        tokens_input = {"type": "token", "prompt_token_ids": prompt}
        async for output in self._engine.generate(tokens_input, params, f"flexpiped-{os.getpid()}-{key}"):
            (choice,) = output.outputs
            logprobs = None if choice.logprobs is None else _chosen(choice.token_ids, choice.logprobs)
            self._put([key, list(choice.token_ids), choice.finish_reason, logprobs])

    def _put(self, output: list[Any]) -> None:
        if not self._outputs:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outputs.append(output)

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._send({"op": "outputs", "items": outputs})

    # --- calls ---

    def _answer(self, call: int, work: Any) -> None:
        task = asyncio.create_task(self._reply(call, work))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _reply(self, call: int, work: Any) -> None:
        try:
            self._send({"op": "reply", "call": call, "result": await work})
        except EngineDeadError as error:
            self._send({"op": "reply", "call": call, "error": str(error)})
            self._send({"op": "dead", "reason": str(error)})
        except Exception as error:  # noqa: BLE001  vLLM raises a bare Exception where a call failed in the core
            self._send({"op": "reply", "call": call, "error": _message_of(error)})

    async def _core(self, method: str, *arguments: Any) -> Any:
        return await self._engine.engine_core.call_utility_async(method, *arguments)

    async def _info(self) -> dict[str, Any]:
        model, parallel = self._engine.model_config, self._engine.vllm_config.parallel_config
        core, tasks = await self._core("flexpiped_info"), await self._engine.get_supported_tasks()
        return {
            "vllm_version": core["vllm_version"],
            "max_model_len": model.max_model_len,
            "vocab_size": model.get_vocab_size(),
            "generates": "generate" in tasks,
            "eos_token_ids": _eos_token_ids(self._engine),
            "pids": {
                "api": os.getpid(),
                "core": core["core_pid"],
                "workers": core["worker_pids"],
                "helpers": core.get("helper_pids", []),
            },
            "pp_size": parallel.pipeline_parallel_size,
            "tp_size": parallel.tensor_parallel_size,
            "refactor_refusal": core["refactor_refusal"],
            "kv_form": core["kv_form"],
            "kv_refusal": core["kv_refusal"],
            "kv_by_nixl": core["kv_by_nixl"],
            "num_kv_blocks": core["num_kv_blocks"],
            "kv_block_tokens": core["block_tokens"],
            "layout": core.get("layout", []),
        }

    def _send(self, message: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


def _params(sampling: dict[str, Any]) -> SamplingParams:
    """Return vLLM's own parameters; a name that it does not know is refused by name."""
    known = set(SamplingParams.__struct_fields__)
    for name in sampling:
        if name not in known or name.startswith("_"):
            raise _Unknown(f"vLLM has no sampling parameter {name!r}", name)
    if sampling.get("logit_bias"):  # JSON's keys are text
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    return SamplingParams(**sampling, detokenize=False, output_kind=RequestOutputKind.DELTA)


class _Unknown(ValueError):
    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


def _chosen(token_ids: Any, logprobs: Any) -> list[float]:
    return [max(float(entry[token].logprob), _LOWEST_LOGPROB) for token, entry in zip(token_ids, logprobs, strict=True)]


def _eos_token_ids(engine: Any) -> list[int]:
    """Return the ids that end a request, as vLLM's input processor finds them."""
    found: list[int] = []
    primary = engine.renderer.get_eos_token_id()
    if primary is not None:
        found.append(primary)
    more = engine.model_config.try_get_generation_config().get("eos_token_id")
    for token in more if isinstance(more, list) else [more]:
        if token is not None and token not in found:
            found.append(token)
    return found


def _named_in(message: str, sampling: dict[str, Any]) -> str:
    """Return the parameter that an error speaks of; vLLM does not say it otherwise in most of them."""
    return next((name for name in sampling if re.search(rf"\b{name}\b", message)), "")


def _message_of(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if error.__cause__ is None else f"{text}: {error.__cause__}"
