"""API, supervisor and the real text process together, with a death of each while a stream is on its way."""

import os
import signal
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from engines.protocol import GenerationRequest
from engines.text.client import TextService
from tests.support.http_app import MODEL, FakeEngines, http_app, saying
from tests.support.tiny_tokenizer import write_model_directory

pytestmark = pytest.mark.real_loop
TEXT = "Once 漢字 🙂 upon a time STOP never"


async def test_a_stream_survives_both_deaths(tmp_path: Path) -> None:
    text = TextService(model=write_model_directory(tmp_path))
    await text.start()
    engines = FakeEngines()
    says = saying(TEXT)

    def with_deaths(request: GenerationRequest, position: int) -> int:
        if position == 6 and len(engines.made) == 1:
            engines.last.kill("killed by the test")
        return says(request, position)

    engines.next_token = with_deaths
    async with (
        http_app(engines=engines, text=text) as app,
        AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], stop="STOP", stream=True
        )
        received = ""
        async for chunk in stream:
            if text.pid is not None and received == "":
                os.kill(text.pid, signal.SIGKILL)
            received += chunk.choices[0].delta.content or ""
        assert received == TEXT.split("STOP", maxsplit=1)[0]
        assert len(engines.made) == 2
        await app.becomes_idle()
    await text.close()
