"""flexpiped's HTTP application, in a process of its own, before an engine whose own server is the stand-in.

``python -m tests.bench.front_app --socket PATH --host HOST --port PORT``. Everything that a request meets in the daemon
is there: middlewares, validation, routing, admission, metrics, and the way to the engine's own server and back.
"""

import argparse
import asyncio
from pathlib import Path

import uvloop

from flexpiped.admission import AdmissionLimits
from flexpiped.long_lived import settle
from tests.support.http_app import FakeEngines, http_app

_UNLIMITED = AdmissionLimits(max_requests_in_flight=4096, max_tokens_in_flight=1 << 40)


async def _serve(options: argparse.Namespace) -> None:
    engines = FakeEngines(own_socket=Path(options.socket))
    async with http_app(engines=engines, limits=_UNLIMITED, port=int(options.port)):
        settle()
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--socket", "--host", "--port"):
        parser.add_argument(option, required=True)
    uvloop.run(_serve(parser.parse_args()))
