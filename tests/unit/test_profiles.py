"""Where profiles are kept, which one fits, what is to be measured, and the admin API's part in it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from engines.errors import UnsupportedByEngine
from engines.native.timing_messages import StageObserved
from flexpiped.admin_profile import ProfileRoutes, profile_routes
from flexpiped.engine_factory import find_files
from flexpiped.profiles import (
    ProfileStore,
    ProfileTarget,
    cpu_name,
    fitted,
    model_digest,
    profile_folder,
    profile_target,
)
from flexpiped.settings import EngineKind, Settings
from planner.errors import InvalidProfile
from planner.profile import Profile
from planner.profile_file import profile_to_json
from tests.support.graphs import SMALL_LLAMA, graph_of
from tests.unit.planner.test_profile import GRAPH, KEY, observed, profile_of

DEMO = str(Path(__file__).parents[2] / "etc" / "demo-model")


def found_in(store: ProfileStore, profile: Profile) -> Profile | None:
    key = profile.key
    return store.find(
        model_digest=key.model,
        dtype=key.dtype,
        engine=key.engine,
        device_name=key.device_name,
        cores=key.cores,
        threads_per_device=key.threads_per_device,
    )[0]


def test_a_profile_is_found_again_by_what_it_is_valid_for(tmp_path: Path) -> None:
    store, profile = ProfileStore(folder=tmp_path / "profiles"), profile_of(*observed())
    assert found_in(store, profile) is None
    path = store.save(profile)
    assert path.parent == tmp_path / "profiles"
    assert path.name.startswith("small-llama-float32-native-0123456789abcdef-")
    assert found_in(store, profile) == profile
    for change in (
        {"cores": 4},
        {"threads_per_device": 1},
        {"device_name": "Other CPU"},
        {"dtype": "bfloat16"},
        {"model": "fedcba9876543210"},
    ):
        other = replace(profile, key=replace(KEY, **change))  # type: ignore[arg-type]
        assert found_in(store, other) is None
    _, why = store.find(model_digest="0", dtype="float32", engine="native", device_name="", cores=1)
    assert why.startswith("no profile of this model, dtype, engine and processor in ")


def test_the_newest_of_several_torch_versions_counts(tmp_path: Path) -> None:
    store, old = ProfileStore(folder=tmp_path), profile_of(*observed())
    new = replace(old, measured_at="2026-02-02 03:04 UTC", key=replace(KEY, torch_version="2.14.0"))
    assert store.save(new) != store.save(old)
    assert found_in(store, old) == new
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_profile_is_named(tmp_path: Path) -> None:
    store, profile = ProfileStore(folder=tmp_path), profile_of(*observed())
    path = store.save(profile)
    path.write_text("{}")
    with pytest.raises(InvalidProfile, match=path.name):
        found_in(store, profile)


def test_one_of_an_older_version_is_named_until_it_is_measured_again(tmp_path: Path) -> None:
    """Measured again with another torch it lies beside the old one, and counts."""
    store, old = ProfileStore(folder=tmp_path), profile_of(*observed())
    path = store.save(old)
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(
        InvalidProfile, match=rf"{path.name}: profile.version must be 2, not 1: measure again with flexctl profile"
    ):
        found_in(store, old)
    new = replace(old, key=replace(KEY, torch_version="2.14.0"))
    store.save(new)
    assert found_in(store, old) == new


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidProfile, match="cannot be kept: "):
        ProfileStore(folder=tmp_path / "file" / "profiles").save(profile_of(*observed()))


def test_profiles_lie_where_the_daemon_keeps_its_state() -> None:
    home = Path("/home/x")
    assert profile_folder({"STATE_DIRECTORY": "/var/lib/flexpiped"}, home=home) == Path("/var/lib/flexpiped/profiles")
    assert profile_folder({}, home=home) == home / ".local/state/flexpiped/profiles"


def test_models_alike_in_size_share_a_digest() -> None:
    assert model_digest(GRAPH) == model_digest(graph_of())
    assert model_digest(GRAPH) != model_digest(graph_of({**SMALL_LLAMA, "num_hidden_layers": 7}))


def test_the_processor_says_its_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert cpu_name(cpuinfo) == "Some CPU @ 3 GHz"
    assert cpu_name(tmp_path / "missing") == ""


def test_what_is_measured_is_what_the_native_engine_would_run() -> None:
    settings = Settings(model=DEMO)
    target = profile_target(settings, source=DEMO)
    graph = find_files(settings, source=DEMO).graph
    assert target.model_digest == model_digest(graph)
    assert target.decoder_weight_bytes == graph.decoders[0].weight_bytes
    assert len(target.options.device_ids) == settings.devices.cpu_count
    with pytest.raises(UnsupportedByEngine, match="the engine here is vllm; its plans rest on the roofline"):
        profile_target(replace(settings, engine=EngineKind.VLLM), source=DEMO)


def observed_stage(each: int) -> StageObserved:
    return StageObserved(
        threads=1, beside_others=False, num_decoders=8, has_embedding=True, has_head=True, tokens=each, sequences=1,
        context_tokens=float(each), busy_s=0.001 * each,
    )  # fmt: skip


def test_what_was_measured_becomes_a_profile() -> None:
    target = profile_target(Settings(model=DEMO), source=DEMO)
    made = fitted(
        target, [observed_stage(each) for each in range(1, 20)], torch_version="2.13.0", cores=2, measured_at="now"
    )
    assert (made.key.engine, made.key.cores, made.key.model) == ("native", 2, target.model_digest)
    assert made.key.threads_per_device == 0
    assert len(made.fits[0].residuals) == 19


async def client_of(routes: ProfileRoutes) -> TestClient[web.Request, web.Application]:
    app = web.Application()
    app.add_routes(routes.routes())
    client = TestClient(TestServer(app))
    await client.start_server()
    return client


@pytest.mark.real_loop
async def test_the_admin_api_says_what_to_measure_and_keeps_it(tmp_path: Path) -> None:
    routes = profile_routes(
        Settings(model=DEMO), source=DEMO, environment={**os.environ, "STATE_DIRECTORY": str(tmp_path)}
    )
    client = await client_of(routes)
    target: ProfileTarget = profile_target(Settings(model=DEMO), source=DEMO)
    answer = await (await client.get("/profile/target")).json()
    assert answer["model_digest"] == target.model_digest
    assert answer["options"]["model_directory"] == DEMO
    kept = await client.post("/profile", data=json.dumps(profile_to_json(profile_of(*observed()))))
    assert Path((await kept.json())["file"]).parent == tmp_path / "profiles"
    refused = await client.post("/profile", data="{}")
    assert refused.status == 409
    assert (await refused.json())["error"]["message"].startswith("profile.version must be a whole number")
    await client.close()
