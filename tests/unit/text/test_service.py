"""The text process for real: a tokenizer directory, a Unix socket, deaths in between."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio

from engines.restarts import RestartPolicy
from engines.text.client import TextService
from engines.text.errors import TextClosed, TextProcessDied, TextRefused, TextStartFailed
from tests.support.tiny_tokenizer import byte_level_tokenizer, write_model_directory
from tests.support.until import until

pytestmark = [pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_directory(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(model: Path) -> AsyncIterator[TextService]:
    service = TextService(model=model, policy=RestartPolicy(max_deaths=100, max_delay_s=0.0))
    await service.start()
    yield service
    assert service.num_open == 0
    await service.close()


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(byte_level_tokenizer().encode(text, add_special_tokens=False).ids)


def kill(service: TextService) -> None:
    assert service.pid is not None
    os.kill(service.pid, signal.SIGKILL)


async def test_encode_as_the_tokenizer_does(service: TextService) -> None:
    text = "Once upon 漢字 🙂"
    assert await service.encode(text, add_special_tokens=False) == ids_of(text)
    assert await service.encode(text) == (0, *ids_of(text))
    assert await service.decode(ids_of(text)) == text


async def test_the_bytes_of_tokens_are_asked_for_once(service: TextService) -> None:
    token_ids = ids_of("Once 漢")
    assert b"".join(await service.pieces(token_ids)) == "Once 漢".encode()
    kill(service)
    assert b"".join(await service.pieces(token_ids)) == "Once 漢".encode()  # while there is no process
    assert b"".join(await service.pieces(ids_of("upon"))) == b"upon"
    assert await service.pieces([]) == []


async def test_chat_renders_the_template(service: TextService) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert await service.chat(messages) == ids_of("user: hello\nassistant: ")


async def test_what_the_template_refuses_is_refused_with_its_words(service: TextService) -> None:
    with pytest.raises(TextRefused, match="no clowns"):
        await service.chat([{"role": "clown", "content": "hello"}])


async def test_many_streams_at_once(service: TextService) -> None:
    async def run(text: str) -> str:
        token_ids = ids_of(text)
        with closing(service.open(prompt_token_ids=(5,))) as feed:
            deltas = [await feed.feed((token_id,)) for token_id in token_ids]
            deltas.append(await feed.feed((), final=True))
        assert deltas[-1].tokens_consumed == len(token_ids)
        return "".join(delta.text for delta in deltas)

    texts = [f"Once upon {number} 漢字 🙂" for number in range(50)]
    assert await asyncio.gather(*(run(text) for text in texts)) == texts


async def test_stop_strings(service: TextService) -> None:
    with closing(service.open(prompt_token_ids=(5,), stop=("STOP",))) as feed:
        delta = await feed.feed(ids_of("Once STOP more"))
    assert (delta.text, delta.stop_hit) == ("Once ", True)


async def test_a_stream_goes_on_over_a_death(service: TextService) -> None:
    """Killed in the middle of a character and of what may be a stop string, with nothing lost or repeated."""
    token_ids = ids_of("Once ST漢字 STOP never")
    at = len(ids_of("Once ST")) + 1  # "ST" may become a stop string, and one byte of 漢 is there
    text, tokens_consumed = "", 0
    with closing(service.open(prompt_token_ids=(5,), stop=("STOP",))) as feed:
        for number, token_id in enumerate(token_ids):
            if number == at:
                kill(service)
            delta = await feed.feed((token_id,))
            text, tokens_consumed = text + delta.text, delta.tokens_consumed
            if delta.stop_hit:
                break
    assert text == "Once ST漢字 "
    assert tokens_consumed == len(token_ids) - len(ids_of(" never"))


async def test_feeds_and_calls_under_way_at_a_death_are_answered(service: TextService) -> None:
    pid = service.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with closing(service.open(prompt_token_ids=(5,))) as feed:
        waiting = [
            asyncio.create_task(feed.feed(ids_of("Once"), final=True)),
            asyncio.create_task(service.encode("upon", add_special_tokens=False)),
        ]
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        delta, token_ids = await asyncio.gather(*waiting)
    assert delta.text == "Once"  # type: ignore[union-attr]
    assert token_ids == ids_of("upon")


async def test_a_model_that_cannot_be_read_is_a_clear_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (write_model_directory(broken) / "tokenizer.json").write_text("{}")
    garbled = tmp_path / "garbled"
    garbled.mkdir()
    (write_model_directory(garbled) / "tokenizer.json").write_text("{")
    services = [TextService(model=folder) for folder in (tmp_path / "nothing", broken, garbled)]
    failures = await asyncio.gather(*(service.start() for service in services), return_exceptions=True)
    for failure in failures:
        assert isinstance(failure, TextStartFailed)
        assert str(failure).startswith(f"the text process did not start: no tokenizer can be read from {tmp_path}/")
        assert "\n" not in str(failure)
    assert f"{garbled}: " in str(failures[2])
    assert "Traceback" not in capfd.readouterr().err
    await asyncio.gather(*(service.close() for service in services))


async def test_a_missing_interpreter_is_a_clear_error(model: Path) -> None:
    with pytest.raises(TextStartFailed, match=r"^the text process did not start: /no-such-python: No such file"):
        await TextService(model=model, python="/no-such-python").start()


async def test_an_interpreter_that_cannot_run_it_is_named(model: Path) -> None:
    service = TextService(model=model, python="/bin/false")
    with pytest.raises(TextStartFailed, match=r"it ended with status 1; /bin/false must be a Python with transformers"):
        await service.start()
    await service.close()


async def test_it_gives_up_in_the_end(model: Path) -> None:
    deaths: list[str] = []
    service = TextService(model=model, policy=RestartPolicy(max_deaths=1), on_death=deaths.append)
    await service.start()
    feed = service.open(prompt_token_ids=(5,))
    kill(service)
    with pytest.raises(TextProcessDied, match="died 1 times within 300 s, at last: it ended with status -9"):
        await feed.feed((5, 6))
    assert deaths == ["it ended with status -9"]
    assert service.failure is not None
    with pytest.raises(TextProcessDied):
        await service.encode("x")
    await service.close()


async def test_close_ends_the_process_and_those_who_wait(model: Path) -> None:
    service = TextService(model=model)
    await service.start()
    pid = service.pid
    assert pid is not None
    waiting = asyncio.create_task(service.encode("x"))
    await asyncio.sleep(0)
    await service.close()
    await service.close()
    with pytest.raises(TextClosed):
        await waiting
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_it_runs_on_uvloop_and_dies_with_its_parent(model: Path) -> None:
    """On the daemon's own event loop, whose transports are not asyncio's; a daemon that is killed leaves no process."""
    program = (
        "import asyncio, sys, uvloop\nfrom pathlib import Path\nfrom engines.text.client import TextService\n"
        "async def main():\n    service = TextService(model=Path(sys.argv[1]))\n    await service.start()\n"
        "    print(await service.encode('Once', add_special_tokens=False))\n    print(service.pid, flush=True)\n"
        "    await asyncio.Event().wait()\nuvloop.run(main())\n"
    )
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(model), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert daemon.stdout is not None
    assert (await daemon.stdout.readline()).decode().strip() == str(ids_of("Once"))
    pid = int(await daemon.stdout.readline())
    daemon.kill()
    await daemon.wait()
    await until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
