"""LoRA adapters come and go by ``flexctl lora`` and by vLLM's routes, with the fake engine behind the whole service."""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from flexpiped.admin_config import Configuration
from flexpiped.reload import ReloadReport
from flexpiped.service import Service
from flexpiped.settings import EngineKind, HttpSettings, JournalSettings, Settings
from tests.unit.flexctl.test_command_line import Ran, flexctl

pytestmark = pytest.mark.real_loop
ROOT = {"Authorization": "Bearer key-of-root"}


class Stand:
    def __init__(self, service: Service, socket: Path, http: aiohttp.ClientSession) -> None:
        self.service = service
        self.http = http
        self.url = service.api_url.removesuffix("/v1")
        self._socket = socket

    async def lora(self, *arguments: str) -> Ran:
        return await flexctl("lora", *arguments, "--socket", str(self._socket))

    async def names(self) -> list[str]:
        async with self.http.get(f"{self.url}/v1/models", headers=ROOT) as response:
            return [card["id"] for card in (await response.json())["data"]]

    async def post(self, path: str, body: object, *, key: str = "root") -> tuple[int, str]:
        headers = {"Authorization": f"Bearer key-of-{key}"}
        async with self.http.post(f"{self.url}/v1/{path}", json=body, headers=headers) as response:
            return response.status, await response.text()


def keys_file(folder: Path) -> Path:
    file = folder / "keys.toml"
    clients = (("root", "admin"), ("alice", "infer"))
    digests = {name: hashlib.sha256(f"key-of-{name}".encode()).hexdigest() for name, _ in clients}
    tables = [
        f'[[keys]]\nname = "{name}"\nsha256 = "{digests[name]}"\nscopes = ["{scope}"]\n' for name, scope in clients
    ]
    file.write_text("".join(tables))
    file.chmod(0o600)
    return file


@pytest.fixture(params=[True], ids=["keys"])
async def stand(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stand]:
    keys = keys_file(tmp_path) if request.param else None
    settings = Settings(
        engine=EngineKind.FAKE,
        http=HttpSettings(port=0, api_keys=keys),
        journal=JournalSettings(file=tmp_path / "journal.db"),
    )
    report = ReloadReport(file="", settings=settings)
    socket = tmp_path / "admin.sock"
    service = Service(
        settings,
        admin_socket=socket,
        on_progress=lambda _message: None,
        configuration=Configuration(settings=lambda: settings, compare=lambda: report, reload=lambda: report),
    )
    async with AsyncExitStack() as stack, aiohttp.ClientSession() as http:
        await service.start(stack)
        yield Stand(service, socket, http)


async def test_by_the_command_line(stand: Stand) -> None:
    [model] = await stand.names()
    loaded = await stand.lora("load", "de", "/srv/de")
    assert (loaded.code, loaded.err) == (0, "")
    assert loaded.out.startswith("requests may name de now")
    assert await stand.names() == [model, "de"]
    shown, as_json = await stand.lora("list"), await stand.lora("list", "--json")
    assert [line.split() for line in shown.out.splitlines()] == [
        ["adapter", "state", "requests", "path"],
        ["de", "serving", "0", "/srv/de"],
    ]
    [card] = json.loads(as_json.out)["adapters"]
    assert card == {"name": "de", "directory": "/srv/de", "requests": 0, "is_leaving": False}
    again, unknown = await stand.lora("load", "de", "/srv/de"), await stand.lora("unload", "fr")
    assert (again.code, again.err) == (4, "refused: adapter 'de' is loaded already\n")
    assert (unknown.code, unknown.err) == (4, "refused: adapter 'fr' is not loaded\n")
    taken = await stand.lora("load", model, "/srv/de")
    assert (taken.code, "is the name of a model" in taken.err) == (4, True)
    gone = await stand.lora("unload", "de", "--json")
    assert json.loads(gone.out) == {"state": "unloaded", "name": "de", "requests": 0}
    assert await stand.names() == [model]
    assert "adapter 'de' unloaded" in [event.message for event in stand.service.events.since(0)]


async def test_by_the_routes_that_vllm_has(stand: Stand) -> None:
    [model] = await stand.names()
    body = {"lora_name": "de", "lora_path": "/srv/de"}
    assert await stand.post("load_lora_adapter", body) == (200, "Success: LoRA adapter 'de' added successfully.")
    completion = {"model": "de", "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
    assert (await stand.post("completions", completion, key="alice"))[0] == 200
    assert await stand.names() == [model, "de"]
    for wrong, status, words in (
        (body, 400, "loaded already"),
        ({"lora_name": "fr"}, 400, "lora_path is required"),
        (body | {"load_inplace": True}, 400, "load_inplace"),
        (body | {"lora_name": "fr", "lora_path": "/srv/broken"}, 400, "there is none"),
        (body | {"rank": 8}, 400, "unknown parameter: rank"),
    ):
        found, text = await stand.post("load_lora_adapter", wrong)
        assert (found, words in text) == (status, True), text
    assert (await stand.post("load_lora_adapter", body, key="alice"))[0] == 403
    gone = await stand.post("unload_lora_adapter", {"lora_name": "de"})
    assert gone == (200, "Success: LoRA adapter 'de' removed successfully.")
    assert (await stand.post("unload_lora_adapter", {"lora_name": "de"}))[0] == 404
    assert (await stand.post("completions", completion, key="alice"))[0] == 404


@pytest.mark.parametrize("stand", [False], indirect=True, ids=["no-keys"])
async def test_without_keys_nobody_has_directories_of_the_host_read_over_http(stand: Stand) -> None:
    status, text = await stand.post("load_lora_adapter", {"lora_name": "de", "lora_path": "/srv/de"})
    assert (status, "needs a key with scope admin" in text) == (403, True)
