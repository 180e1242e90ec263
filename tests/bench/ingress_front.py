"""What stands in a daemon behind its ingress processes, in a process of its own, and the ingress processes before it.

``python -m tests.bench.ingress_front --processes N --socket PATH --host HOST --port PORT``. Requests for an engine's
own server go to the stand-in at PATH; others are the fake engine's, whose tokens cost as little as they can.
``--processes 0``: this process serves HTTP itself, as a daemon does without any.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from engines.text.client import TextService
from engines.text.protocol import Text
from flexpiped.admission import AdmissionLimits
from flexpiped.api.backends import BACKENDS
from flexpiped.ingress.messages import Model
from flexpiped.ingress.opening import Live, ingresses
from flexpiped.native_interpreter import engine_python
from flexpiped.servers import listen_tcp
from flexpiped.settings import HttpSettings, Settings
from tests.bench.processes import ROOT
from tests.support.http_app import CAPABILITIES, MODEL, FakeEngines, http_app, saying

_UNLIMITED = AdmissionLimits(max_requests_in_flight=4096, max_tokens_in_flight=1 << 40)


async def _serve(options: argparse.Namespace) -> None:
    engines = FakeEngines(
        own_socket=Path(options.socket),
        next_token=saying("", then=[40, 41]),
        step_s=options.step_ms / 1e3,
        capabilities=replace(CAPABILITIES, max_model_len=4096),
    )
    settings = Settings(http=HttpSettings(ingress_processes=max(options.processes, 1)))
    tokenizer, python = ROOT / "etc" / "demo-model", engine_python(settings)
    alone = not options.processes
    async with AsyncExitStack() as stack:
        text: Text | None = None  # the ingress processes have their own
        if alone:
            text = TextService(model=tokenizer, python=python)
            await text.start()
            stack.push_async_callback(text.close)
        port = int(options.port) if alone else 0
        app = await stack.enter_async_context(http_app(engines=engines, text=text, limits=_UNLIMITED, port=port))
        if alone:
            await asyncio.Event().wait()
        capabilities = app.backend.serving.capabilities
        assert capabilities is not None, "it serves"
        model = Model(
            name=MODEL,
            serial=app.backend.serial,
            capabilities=capabilities,
            sampling_defaults={},
            tool_format="auto",
            tokenizer_directory=str(tokenizer),
            python=python,
        )
        live = Live(
            settings=lambda: settings,
            keys=lambda: None,
            models=lambda: (model,),
            are_named=lambda: False,
            reloads=lambda: 0,
        )
        listener = listen_tcp(options.host, int(options.port), is_shared=True)
        with TemporaryDirectory(prefix="flexpiped-bench-ingress-") as folder:
            async with ingresses(
                app.app,
                app.app[BACKENDS],
                live,
                listener=listener,
                socket=Path(folder) / "daemon.http",
                last_words_s=1.0,
                on_news=print,
                on_given_up=print,
            ) as fleet:
                await fleet.until_serving(frozenset({MODEL}), within_s=60.0)
                listener.close()
                await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--socket", "--host", "--port"):
        parser.add_argument(option, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--step-ms", type=float, default=0.0)
    uvloop.run(_serve(parser.parse_args()))
