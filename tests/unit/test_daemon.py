"""The real daemon as a process, with the fake engine: its life, and what it refuses to start with."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest

from flexpiped.admin_socket import take_socket
from flexpiped.servers import PortTaken, listen_tcp
from tests.support.daemon import ROOT, Daemon, run_until_exit, started, write_config, write_keys
from tests.support.fake_vllm import fake_interpreter
from tests.support.until import until

pytestmark = pytest.mark.real_loop
SMALL = '\nengines.vllm.kv_cache = "8 MiB"\n'


async def test_its_life(tmp_path: Path) -> None:
    """Start, serve, reload, be asked to stop: one process, as each start takes seconds."""
    async with started(tmp_path, ready=True) as daemon:
        status = await daemon.ask("/status")
        assert (status["state"], status["engine"], len(status["stages"])) == ("ready", "fake", 2)

        async with aiohttp.ClientSession() as session:
            async with session.get(status["api_url"].replace("/v1", "/readyz")) as answer:
                assert answer.status == 200
            body = {"prompt": "Once", "max_tokens": 3, "ignore_eos": True}
            async with session.post(f"{status['api_url']}/completions", json=body) as answer:
                assert (await answer.json())["usage"]["completion_tokens"] == 3
        arrivals = (await daemon.ask("/status"))["arrivals"]
        assert [each["window_s"] for each in arrivals] == [30.0, 180.0, 1800.0]
        assert all(each["requests_per_s"] > 0 for each in arrivals)
        assert {each["cv"] for each in arrivals} == {"too few requests to say"}

        write_config(tmp_path, stages=3)
        daemon.process.send_signal(signal.SIGHUP)
        await daemon.notification("RELOADING=1")
        assert "restart to apply: stages" in await daemon.notification("READY=1")
        write_config(tmp_path, stages=3, more="admission.max_requests_in_flight = 7\nlog.level = 'debug'\n")
        code, shown, _ = await daemon.flexctl("config", "diff")
        assert (code, "admission.max_requests_in_flight  256 -> 7  live" in shown) == (0, True), shown
        code, shown, _ = await daemon.flexctl("reload")
        assert (code, "applied: admission.max_requests_in_flight, log.level; restart" in shown) == (0, True), shown
        await daemon.notification("READY=1")
        code, shown, _ = await daemon.flexctl("config", "show")
        assert {"admission.max_requests_in_flight = 7", "stages = 2"} <= set(shown.splitlines())
        daemon.config.write_text("stagse = 3")
        code, _, said = await daemon.flexctl("reload")
        assert (code, 'did you mean "stages"?' in said) == (4, True), said
        await daemon.notification("READY=1")
        daemon.process.send_signal(signal.SIGHUP)
        assert "the old one stays in force" in await daemon.notification("READY=1")

        daemon.process.send_signal(signal.SIGINT)  # the solver must have left its handler alone
        assert "stopping on SIGINT" in await daemon.notification("STOPPING=1")
        log = await daemon.ended()
        assert daemon.process.returncode == 0, log
        assert not daemon.admin.exists()


async def test_a_reload_reads_the_file_of_keys_again(tmp_path: Path) -> None:
    more = f'http.api_keys = "{write_keys(tmp_path, "old")}"\n'
    async with started(tmp_path, ready=True, more=more) as daemon, aiohttp.ClientSession() as session:
        url = (await daemon.ask("/status"))["api_url"]

        async def answered(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            async with session.post(
                f"{url}/completions", json={"prompt": "Once", "max_tokens": 2}, headers=headers
            ) as answer:
                return answer.status

        assert [await answered(key) for key in ("old", "new")] == [200, 401]
        write_keys(tmp_path, "new")
        assert [await answered(key) for key in ("old", "new")] == [200, 401]  # not before it is told
        daemon.process.send_signal(signal.SIGHUP)
        await daemon.notification("RELOADING=1")
        await daemon.notification("READY=1")
        assert [await answered(key) for key in ("old", "new")] == [401, 200]


async def test_asked_to_stop_while_starting(tmp_path: Path) -> None:
    async with started(tmp_path, ready=False) as daemon:
        daemon.process.send_signal(signal.SIGTERM)
        log = await daemon.ended()

        assert daemon.process.returncode == 0, log
        assert not daemon.admin.exists()


async def reload_tells_no_manager(daemon: Daemon) -> None:
    daemon.waiting_notifications()  # they are read, so that there is room for more
    code, _, said = await daemon.flexctl("reload")
    assert code == 0, said
    told = daemon.waiting_notifications()
    assert not [message for message in told if "READY=1" in message or "RELOADING=1" in message]


async def test_while_it_starts_a_rebalance_is_refused_and_a_reload_does_not_make_it_ready(tmp_path: Path) -> None:
    python = fake_interpreter(tmp_path)
    more = f'engines.vllm.python = "{python}"{SMALL}engines.vllm.env.FAKE_VLLM = "silent"\n'  # it is never ready
    async with started(tmp_path, ready=False, engine="vllm", stages=1, more=more) as daemon:

        async def waits_for_vllm() -> bool:
            return daemon.admin.exists() and "vLLM" in (await daemon.ask("/status"))["reason"]

        await until(waits_for_vllm, timeout_s=60.0)
        code, _, said = await daemon.flexctl("rebalance", "--stages", "2")
        assert (code, "no engine serves now" in said) == (1, True), (code, said)
        await reload_tells_no_manager(daemon)
        daemon.process.send_signal(signal.SIGTERM)  # killed, it would leave the fake's processes
        await daemon.process.wait()


async def test_asked_to_stop_it_says_so_lets_streams_finish_and_takes_no_others(tmp_path: Path) -> None:
    async with started(tmp_path, ready=True) as daemon, aiohttp.ClientSession() as session:
        url = (await daemon.ask("/status"))["api_url"]
        body = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
        async with session.post(f"{url}/completions", json=body) as answer:
            await answer.content.readline()
            daemon.process.send_signal(signal.SIGTERM)
            assert "EXTEND_TIMEOUT_USEC=60000000" in await daemon.notification("STOPPING=1")
            async with session.get(url.replace("/v1", "/readyz")) as probe:
                assert (probe.status, (await probe.json())["status"]) == (503, "draining")
            async with session.post(f"{url}/completions", json=body) as refused:
                assert (refused.status, (await refused.json())["error"]["code"]) == (503, "draining")
                assert int(refused.headers["Retry-After"]) >= 1
            rest = (await answer.content.read()).decode()
        assert rest.endswith("data: [DONE]\n\n")
        await daemon.ended()
        assert daemon.process.returncode == 0


async def test_streams_are_cut_off_when_their_time_to_finish_is_over(tmp_path: Path) -> None:
    async with (
        started(tmp_path, ready=True, more="http.drain_deadline_s = 0.05\n") as daemon,
        aiohttp.ClientSession() as session,
    ):
        url = (await daemon.ask("/status"))["api_url"]
        body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        async with session.post(f"{url}/completions", json=body) as answer:
            await answer.content.readline()
            assert answer.status == 200
            daemon.process.send_signal(signal.SIGTERM)
            rest = b""
            with suppress(aiohttp.ClientPayloadError):
                async for line in answer.content:
                    rest += line
            assert b"[DONE]" not in rest
        await daemon.ended()
        assert daemon.process.returncode == 0


async def test_the_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    async with started(tmp_path, ready=True) as daemon:
        status = await daemon.ask("/status")
        body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{status['api_url']}/completions", json=body) as answer,
        ):
            await answer.content.readline()
            daemon.process.send_signal(signal.SIGTERM)
            await daemon.notification("STOPPING=1")
            assert (await daemon.ask("/status"))["state"] == "draining"
            code, _, said = await daemon.flexctl("rebalance", "--stages", "1")
            assert (code, "the daemon is draining: streams in flight are finishing" in said) == (4, True), said
            await reload_tells_no_manager(daemon)
            daemon.process.send_signal(signal.SIGTERM)
            await daemon.process.wait()

        assert daemon.process.returncode == 1


@pytest.mark.parametrize(("engine", "more"), [("fake", ""), ("vllm", 'engines.vllm.python = "/opt/vllm/bin/python"')])
async def test_a_taken_port_is_an_error(tmp_path: Path, engine: str, more: str) -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        code, log = await run_until_exit(write_config(tmp_path, port=port, engine=engine, more=more))

    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose another http.port." in log


async def test_an_address_of_another_host_is_an_error() -> None:
    with pytest.raises(
        PortTaken, match=r"192\.0\.2\.1:.*Cannot assign requested address\. Choose another http\.host\."
    ):
        listen_tcp("192.0.2.1", 0)


async def test_an_interrupt_before_it_has_begun_ends_it(tmp_path: Path) -> None:
    """A configuration that comes through a pipe holds it up there."""
    pipe = tmp_path / "flexpiped.toml"
    os.mkfifo(pipe)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexpiped", "--config", str(pipe)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    with await asyncio.to_thread(pipe.open, "w"):  # opens once it reads
        while process.returncode is None:
            process.send_signal(signal.SIGINT)  # Python does not notice one that comes just before it waits in a read
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5.0)
        out, _ = await process.communicate()

    assert (process.returncode, out) == (0, b"")


async def test_another_daemon_at_the_admin_socket_is_an_error(tmp_path: Path) -> None:
    with take_socket(tmp_path / "admin.sock"):
        code, log = await run_until_exit(write_config(tmp_path))

    assert (code, "another daemon answers" in log) == (1, True)


async def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.write_text('model = "/no/such/model"\n' + config.read_text())

    code, log = await run_until_exit(config)

    assert (code, "no such directory: /no/such/model" in log) == (1, True)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (f'engines.vllm.python = "/no/such/python"{SMALL}', "engines.vllm.python: there is no /no/such/python"),
        ('devices.cpu_memory = "2 MiB"', "needs"),
        (
            'max_model_len = 4000\nengines.vllm.kv_cache = "1 MiB"',
            "engines.vllm.kv_cache: a sequence of max_model_len 4000 needs",
        ),
    ],
    ids=["interpreter", "device memory", "KV cache"],
)
async def test_what_vllm_cannot_start_with_is_an_error_at_once(tmp_path: Path, more: str, reason: str) -> None:
    code, log = await run_until_exit(write_config(tmp_path, stages=1, engine="vllm", more=f"{more}\n"))

    assert (code, reason in log, "Traceback" in log) == (1, True, False), log


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flexpiped", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("extra", [("--check-config",), ()], ids=["checked", "started"])
def test_a_wrong_configuration_is_told_off_before_anything_starts(tmp_path: Path, extra: tuple[str, ...]) -> None:
    config = tmp_path / "my.toml"
    config.write_text("\nstagse = 2\n")

    ran = command("--config", str(config), *extra)

    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f'{config}:2: unknown key "stagse"; did you mean "stages"?\n'


def test_a_right_configuration_is_ok(tmp_path: Path) -> None:
    config = write_config(tmp_path)

    assert command("--check-config", "--config", str(config)).stdout == f"{config}: ok\n"
    assert command("--check-config").stdout == "built-in defaults: ok\n"


def test_the_daemon_never_imports_torch_or_transformers() -> None:
    code = "import sys, flexpiped.daemon, engines.native.adapter; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    loaded = set(ran.stdout.split())
    assert "flexpiped.daemon" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "sglang", "ray", "ortools"}


def test_flexctl_loads_the_standard_library_only() -> None:
    code = "import sys, flexpiped.flexctl.__main__; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    outside = {name.partition(".")[0] for name in ran.stdout.split()} - set(sys.stdlib_module_names)
    assert outside == {"__main__", "flexpiped", "topology"}
