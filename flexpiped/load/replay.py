"""Sends the requests of a trace when their time comes, whatever became of those before (open loop), and times them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from flexpiped.load.stream import AnswerStream, BrokenStream
from flexpiped.load.target import BadTarget, Target
from planner.request_figures import RequestTimes
from planner.traces import TraceRequest

_ERROR_CHARACTERS = 200


class NoServer(Exception):
    """Nothing answers at the URL; the message says how it was tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a replay is."""

    sent: int
    ended: int
    failed: int
    of: int
    elapsed_s: float
    last_arrival_s: float


async def find_model(target: Target) -> str:
    """Return the name of the first model that the server offers.

    Raises:
        NoServer: Nothing listens there.
        BadTarget: What answers offers no model list; the message says what it answered.
    """
    timeout = aiohttp.ClientTimeout(total=min(30.0, target.timeout_s))
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=target.headers) as session,
            session.get(f"{target.url}/models") as answer,
        ):
            if answer.status != 200:
                raise BadTarget(f"{target.url}/models answers {answer.status}: is this an OpenAI-compatible API?")
            listed = await answer.json(content_type=None)
            return str(listed["data"][0]["id"])
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        raise NoServer(f"no server at {target.url} ({error or 'no answer in time'})") from None
    except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError):
        raise BadTarget(f"{target.url}/models has no list of models: is this an OpenAI-compatible API?") from None


async def replay(
    target: Target,
    trace: Sequence[TraceRequest],
    *,
    seed: int,
    on_progress: Callable[[Progress], None],
    on_ended: Callable[[RequestTimes], None] = lambda _: None,
) -> list[RequestTimes]:
    """Send every request and return how each went, in order of arrival. Times count from the start.

    ``on_ended`` is told of each as it ends, for who gives up before the last one has.

    A request's arrival is when it was to be sent; a generator that is late counts against the server's figures, never
    for them. What goes wrong with a request is its own failure, not an error of the replay.
    """
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    found: list[RequestTimes | None] = [None] * len(trace)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=target.headers) as session:
        sender = _Sender(target, session, seed=seed)
        last_s = trace[-1].arrival_s
        state = _State(len(trace), last_arrival_s=last_s, start_s=sender.start_s, tell=on_progress, on_ended=on_ended)
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(trace):
                await asyncio.sleep(max(0.0, sender.start_s + request.arrival_s - time.monotonic()))
                task = group.create_task(sender.send(number, request))
                task.add_done_callback(lambda done, number=number: state.ended(found, number, done))  # type: ignore[misc]
                state.sent()
    return [each for each in found if each is not None]


class _State:
    """Counts, and tells."""

    def __init__(
        self,
        of: int,
        *,
        last_arrival_s: float,
        start_s: float,
        tell: Callable[[Progress], None],
        on_ended: Callable[[RequestTimes], None],
    ) -> None:
        self._on_ended = on_ended
        self._of, self._last_arrival_s, self._start_s, self._tell = of, last_arrival_s, start_s, tell
        self._sent = self._ended = self._failed = 0

    def sent(self) -> None:
        self._sent += 1
        self._report()

    def ended(self, found: list[RequestTimes | None], number: int, task: "asyncio.Task[RequestTimes]") -> None:
        if task.cancelled() or task.exception() is not None:  # the group raises it
            return
        found[number] = task.result()
        self._on_ended(task.result())
        self._ended += 1
        self._failed += bool(task.result().failure)
        self._report()

    def _report(self) -> None:
        self._tell(
            Progress(
                sent=self._sent,
                ended=self._ended,
                failed=self._failed,
                of=self._of,
                elapsed_s=time.monotonic() - self._start_s,
                last_arrival_s=self._last_arrival_s,
            )
        )


class _Sender:
    def __init__(self, target: Target, session: aiohttp.ClientSession, *, seed: int) -> None:
        self._target = target
        self._session = session
        self._seed = seed
        self.start_s = time.monotonic()

    async def send(self, number: int, request: TraceRequest) -> RequestTimes:
        """Send a request and return how it went."""
        stream, failure = AnswerStream(), ""
        body = self._target.body(request, seed=hash((self._seed, number)))
        try:
            async with self._session.post(self._target.path, json=body) as answer:
                if answer.status != 200:
                    failure = f"{answer.status}: {(await answer.text(errors='replace'))[:_ERROR_CHARACTERS]}"
                else:
                    async for data in answer.content.iter_any():
                        stream.feed(data, now_s=time.monotonic())
                    stream.finish()
        except BrokenStream as error:
            failure = str(error)
        except TimeoutError:
            failure = f"no end within {self._target.timeout_s:g} s"
        except aiohttp.ClientError as error:
            failure = f"{type(error).__name__}: {error}"
        return RequestTimes(
            arrival_s=request.arrival_s,
            first_token_s=None if stream.first_s is None else stream.first_s - self.start_s,
            end_s=None if failure or stream.last_s is None else stream.last_s - self.start_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=stream.output_tokens,
            failure=failure,
        )
