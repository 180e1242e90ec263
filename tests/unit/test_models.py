"""Several models in one daemon, with the fake engine: picked, stopped, started, swapped, reloaded, restored."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flexpiped.admin_config import Configuration
from flexpiped.config_file import load_config
from flexpiped.models import demo_model_places
from flexpiped.reload import ReloadReport, compare
from flexpiped.service import Service
from tests.support.metrics import undocumented
from tests.support.until import until
from tests.unit.flexctl.test_command_line import flexctl

pytestmark = pytest.mark.real_loop
DEMO = demo_model_places()[0]
HEAD = 'engine = "fake"\nstages = 1\nhttp.port = 0\n'
TWO = f'[models.a]\nmodel = "{DEMO}"\n[models.b]\nmodel = "{DEMO}"\nstages = 2\n'


@dataclass(kw_only=True)
class Stand:
    """A daemon in this process, its API and its admin API."""

    service: Service
    api: aiohttp.ClientSession
    admin: aiohttp.ClientSession
    config: Path

    async def complete(self, model: str | None, *, max_tokens: int = 3) -> tuple[int, dict[str, Any]]:
        body = {
            "prompt": "Once",
            "max_tokens": max_tokens,
            "ignore_eos": True,
            **({} if model is None else {"model": model}),
        }
        async with self.api.post("/v1/completions", json=body) as answer:
            return answer.status, await answer.json()

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        async with self.admin.request("GET" if body is None else "POST", path, json=body) as answer:
            text = await answer.text()
            lines = [json.loads(line) for line in text.splitlines()]
            return answer.status, lines[0] if len(lines) == 1 else lines

    async def change(self, what: str, **body: Any) -> dict[str, Any]:
        """Return the last event of a change that has ended."""
        _, events = await self.ask(f"/models/{what}", {"wait": True, **body})
        return events[-1]

    async def models(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in (await self.ask("/models"))[1]["models"]}

    def reload(self, document: str) -> ReloadReport:
        self.config.write_text(HEAD + document)
        report = compare(self.service._settings, self.config)
        self.service.apply(report.settings, keys=None, tls=None)
        return report

    async def becomes(self, **states: str) -> None:
        async def are() -> bool:
            return {name: each["state"] for name, each in (await self.models()).items()} == states

        await until(are, timeout_s=60.0)


@asynccontextmanager
async def daemon(folder: Path, document: str = TWO) -> AsyncIterator[Stand]:
    config = folder / "my.toml"
    config.write_text(f'{HEAD}journal.file = "{folder / "journal.db"}"\n{document}')
    settings = load_config(config)
    report = ReloadReport(file="", settings=settings)
    service = Service(
        settings,
        admin_socket=folder / "admin.sock",
        on_progress=lambda _message: None,
        configuration=Configuration(settings=lambda: settings, compare=lambda: report, reload=lambda: report),
    )
    async with AsyncExitStack() as stack:
        await service.start(stack)
        connector = aiohttp.UnixConnector(str(folder / "admin.sock"))
        async with (
            aiohttp.ClientSession(service.api_url.removesuffix("/v1")) as api,
            aiohttp.ClientSession("http://flexpiped", connector=connector) as admin,
        ):
            yield Stand(service=service, api=api, admin=admin, config=config)


async def test_two_models_are_picked_by_name_and_one_stops_and_starts(tmp_path: Path) -> None:
    async with daemon(tmp_path) as stand:
        async with stand.api.get("/v1/models") as answer:
            assert [each["id"] for each in (await answer.json())["data"]] == ["a", "b"]
        for name in ("a", "b"):
            status, body = await stand.complete(name)
            assert (status, body["model"], body["usage"]["completion_tokens"]) == (200, name, 3)
        status, body = await stand.complete("c")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert "'a', 'b'" in body["error"]["message"]
        status, body = await stand.complete(None)
        assert (status, body["error"]["code"]) == (400, "missing_model")

        for query, name in (("", "a"), ("?model=b", "b"), ("?model=c", "a")):  # there is no c, so the first
            async with stand.api.get(f"/dashboard/stream{query}") as stream:
                while not (line := await stream.content.readline()).startswith(b'data: {"now_unix_s"'):
                    assert line
                shown = json.loads(line.removeprefix(b"data: "))["status"]
            assert [shown["model"]["name"], *(each["model"]["name"] for each in shown["models"])] == [name, "a", "b"]
        status, body = await stand.ask("/rebalance", {"stages": 2})
        assert (status, body["error"]["code"]) == (400, "which_model")
        _, events = await stand.ask("/rebalance?model=a", {"stages": 3, "wait": True})
        assert events[-1]["fields"]["record"]["result"] == "done"
        assert {name: each["stages"] for name, each in (await stand.models()).items()} == {"a": 3, "b": 2}

        ended = await stand.change("stop", model="a")
        assert ended["fields"]["result"] == "done"
        said = [(event.fields.get("model"), event.message) for event in stand.service.events.since(0)]
        assert ("a", "model a is being stopped") in said
        assert "the daemon is shutting down" not in [message for _, message in said]
        status, body = await stand.complete("a")
        assert (status, body["error"]["code"]) == (503, "stopped")
        assert (await stand.complete("b"))[0] == 200
        assert (await stand.ask("/models/stop", {"model": "a"}))[1]["error"]["code"] == "refused"
        assert (await stand.ask("/models/stop", {"model": "x"}))[1]["error"]["code"] == "unknown_model"
        async with stand.api.get("/readyz") as answer:
            assert answer.status == 200  # what was stopped by hand is not missed
        async with stand.api.get("/metrics") as answer:
            text = await answer.text()
        lines = text.splitlines()
        assert 'flexpiped_requests_total{endpoint="completions",model="b",outcome="done"} 2.0' in lines
        assert 'flexpiped_model_state{model="a",state="stopped"} 1.0' in lines
        families = [line for line in lines if line.startswith("# TYPE")]
        assert len(families) == len(set(families))
        assert undocumented(text) == []

    async with daemon(tmp_path) as stand:  # again: what was stopped stays so
        assert {name: each["state"] for name, each in (await stand.models()).items()} == {"a": "stopped", "b": "ready"}
        assert (await stand.change("start", model="a"))["fields"]["result"] == "done"
        assert (await stand.models())["a"]["stages"] == 3  # the last layout
        assert (await stand.complete("a"))[0] == 200


async def test_a_reload_adds_changes_and_removes_models_while_others_serve(tmp_path: Path) -> None:
    async with daemon(tmp_path, f'[models.a]\nmodel = "{DEMO}"\n') as stand:
        assert (await stand.complete(None))[0] == 200  # there is only one
        report = stand.reload(TWO)
        assert [change.key.name for change in report.changes if change.key.name.startswith("models")] == [
            "models.b.model",
            "models.b.stages",
        ]
        await stand.becomes(a="ready", b="ready")
        assert (await stand.complete("b"))[0] == 200

        stand.reload(TWO.replace("stages = 2", "stages = 4"))

        async def is_changed() -> bool:
            return (await stand.models())["b"]["stages"] == 4

        await until(is_changed, timeout_s=60.0)
        stand.reload(f'[models.b]\nmodel = "{DEMO}"\nstages = 4\n')
        await stand.becomes(b="ready")
        assert (await stand.complete("a"))[0] == 404


async def test_what_does_not_fit_beside_the_other_is_refused_with_numbers_or_takes_the_place_of_the_old(
    tmp_path: Path,
) -> None:
    """KV caches of 12 and 40 MiB, of which one device has no room for both beside the weights."""
    small = 'devices = { kind = "cpu", cpu_count = 1, cpu_memory = "64 MiB" }\nengines.native.kv_cache = "12 MiB"\n'
    own = f'[models.a]\nmodel = "{DEMO}"\n'
    full = f'[models.b]\nmodel = "{DEMO}"\nengines.native.kv_cache = "40 MiB"\n'
    async with daemon(tmp_path, small + own + full) as stand:
        models = await stand.models()
        assert [models[name]["state"] for name in ("a", "b")] == ["ready", "failed"]
        assert "MiB" in models["b"]["reason"]
        async with stand.api.get("/readyz") as answer:
            assert answer.status == 503
            assert (await answer.json())["reason"].startswith("model b: ")
        assert (await stand.complete("a"))[0] == 200
        other = tmp_path / "other"
        other.symlink_to(DEMO)
        assert (await stand.change("stop", model="a"))["fields"]["result"] == "done"
        assert (await stand.change("start", model="b"))["fields"]["result"] == "done"
        ended = await stand.change("start", model="a")
        assert ended["fields"]["result"] == "refused"
        ended = await stand.change("swap", model="b", path=str(other))  # two of b have no room
        assert ended["fields"]["result"] == "done"
        assert (await stand.complete("b"))[0] == 200
        assert (await stand.models())["b"]["path"] == str(other)

    async with daemon(tmp_path, small + full) as stand:  # what was asked for by hand stays
        b = (await stand.models())["b"]
        assert (b["path"], b["state"], b["is_as_configured"]) == (str(other), "ready", False)


@pytest.mark.parametrize(
    ("path", "said"), [("/nope", "no such directory: /nope"), ("{empty}", "{empty} has no config.json")]
)
async def test_a_swap_to_what_is_no_model_is_refused_and_the_old_one_serves_on(
    tmp_path: Path, path: str, said: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    path, said = path.format(empty=empty), said.format(empty=empty)
    async with daemon(tmp_path) as stand:
        ran = await flexctl("--socket", str(tmp_path / "admin.sock"), "model", "swap", "b", path)
        assert (ran.code, ran.err) == (4, "")
        assert ran.out.splitlines()[-1] == f"swap b to {path}: refused: {said}"
        assert (await stand.models())["b"]["path"] == str(DEMO)
        assert (await stand.complete("b"))[0] == 200


async def test_what_the_other_model_holds_of_the_devices_stands_in_the_decisions_of_each(tmp_path: Path) -> None:
    """a has one stage, on cpu:0, and b two, on cpu:0 and cpu:1."""
    async with daemon(tmp_path, 'auto = { mode = "dry-run", interval_s = 0.2 }\n' + TWO) as stand:
        for model, taken in (("a", {"cpu:0", "cpu:1"}), ("b", {"cpu:0"})):

            async def is_told(model: str = model, taken: set[str] = taken) -> bool:
                _, said = await stand.ask(f"/decisions?model={model}")
                numbers = said[-1]["fields"]["numbers"] if isinstance(said, list) and said else {}
                return {name for name in numbers if name.startswith("taken_bytes_")} == {
                    f"taken_bytes_{device}" for device in taken
                }

            await until(is_told)
