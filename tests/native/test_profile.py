"""``flexctl profile`` for real, by the engine's own workers; and what the engine itself tells of its stages' times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner.model_graph import build_model_graph
from planner.profile_file import parse_profile
from tests.support.daemon import started
from tests.support.native import even, llama, request, running
from tests.support.published_models import OPT_66B

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]


def flexctl(*arguments: str, state: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "flexpiped.flexctl", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"XDG_STATE_HOME": str(state), "STATE_DIRECTORY": ""},
    )


def config(folder: Path, model: Path) -> Path:
    path = folder / "profile.toml"
    path.write_text(
        f'model = "{model}"\ndtype = "float32"\n[devices]\ncpu_count = 2\n'
        '[engines.native]\nthreads = 1\nkv_cache = "1 MiB"\nmax_num_seqs = 8\nmax_num_batched_tokens = 64\n'
    )
    return path


def test_a_profile_is_measured_fitted_shown_and_kept(tmp_path: Path) -> None:
    done = flexctl("profile", "--short", "--json", "--config", str(config(tmp_path, llama())), state=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    kept = Path(answer["file"])
    assert kept.parent == tmp_path / "flexpiped" / "profiles"
    profile = parse_profile(kept.read_bytes())
    config_values = json.loads((llama() / "config.json").read_text())
    assert profile.decoder_weight_bytes == build_model_graph(config_values, dtype="float32").decoders[0].weight_bytes
    assert {(fit.threads, fit.beside_others) for fit in profile.fits} == {(1, False)}
    assert len(profile.fits[0].residuals) > 20
    assert profile.mean_residual < 1


def test_a_model_that_the_native_engine_does_not_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**OPT_66B.config, "model_type": "mamba"}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = flexctl("profile", "--model", str(tmp_path), state=tmp_path)
    assert done.returncode == 4
    assert "model_type 'mamba' is not supported; supported are: gemma2" in done.stderr


@pytest.mark.long
async def test_a_running_daemon_says_what_to_measure_and_keeps_it(tmp_path: Path) -> None:
    small = '[devices]\ncpu_count = 2\n[engines.native]\nthreads = 1\nkv_cache = "1 MiB"\nmax_num_seqs = 8\n'
    async with started(tmp_path, ready=True, engine="native", more=small) as daemon:
        code, out, err = await daemon.flexctl("profile", "--short")
        assert code == 0, err
        assert out.startswith("the daemon serves meanwhile: measuring competes with it")
        (kept,) = (tmp_path / "state" / "profiles").glob("*.json")
        assert out.splitlines()[-1] == f"kept in {kept}"
        assert parse_profile(kept.read_bytes()).key.engine == "native"


async def test_the_engine_tells_what_each_stage_computed() -> None:
    async with running(llama(), even(2), threads=1) as engine:
        async for _ in engine.generate(request(tuple(range(20, 40)), max_tokens=6)):
            pass
        steps = await engine.stage_steps()
        assert steps.tokens == [[20, 1, 1, 1, 1, 1]] * 2
        assert steps.sequences == [[1] * 6] * 2
        assert steps.context == [[20, 21, 22, 23, 24, 25]] * 2
        assert all(0 < each < 5 for stage in steps.busy_s for each in stage)
        assert (await engine.stage_steps()).tokens == [[], []]
