"""Measured times where there are some, estimated ones until then; either says what it is."""

from dataclasses import replace
from pathlib import Path

from flexpiped.costs import Costs, costs_of
from flexpiped.profiles import ProfileStore, model_digest
from planner.layer_costs import decode_batch, layer_classes, stage_s
from tests.unit.planner.planning_questions import answer
from tests.unit.planner.test_profile import GRAPH, KEY, observed, profile_of
from topology.device import Device, DeviceKind, cpu_devices

CPUS = cpu_devices(count=2, memory_bytes=1 << 30, threads=1)


def costs_here(folder: Path, *, devices: tuple[Device, ...] = CPUS, cores: int = 2) -> Costs:
    store = ProfileStore(folder=folder)
    return costs_of(GRAPH, devices, engine="native", cores=cores, store=store, device_name=KEY.device_name)


def test_a_roofline_stands_in_until_a_profile_is_measured(tmp_path: Path) -> None:
    estimated = costs_here(tmp_path)
    assert estimated.source.startswith("not measured: roofline estimate for float32 from guessed bandwidth")
    assert estimated.note.startswith("no profile of this model, dtype, engine and processor in ")
    profile = profile_of(*observed(), *observed(beside=True, factor=2.0))
    ProfileStore(folder=tmp_path).save(replace(profile, key=replace(KEY, model=model_digest(GRAPH))))
    measured = costs_here(tmp_path)
    assert measured.source.startswith("measured 2026-01-02 03:04 UTC on Some CPU, native engine")
    assert measured.note == ""
    batch, classes = decode_batch(sequences=4, context_tokens=64), layer_classes(GRAPH.layers)
    alone, beside = (stage_s(each, classes, CPUS[0], batch) for each in (measured.alone, measured.beside))
    assert 1.9 < beside / alone < 2.1


def test_a_plan_on_a_profile_with_high_residuals_says_so(tmp_path: Path) -> None:
    profile = profile_of(*observed(noise=0.3))
    ProfileStore(folder=tmp_path).save(replace(profile, key=replace(KEY, model=model_digest(GRAPH))))
    found = answer(graph=GRAPH, costs=costs_here(tmp_path).alone)
    assert "warning: mean residual 2" in found.times_from
    assert found.times_from.endswith(profile.warning)


def test_a_profile_of_other_cores_or_of_a_cpu_does_not_count(tmp_path: Path) -> None:
    ProfileStore(folder=tmp_path).save(replace(profile_of(*observed()), key=replace(KEY, model=model_digest(GRAPH))))
    assert costs_here(tmp_path, cores=4).source.startswith("not measured")
    gpu = Device(id="GPU-1", kind=DeviceKind.CUDA, memory_total_bytes=1, name="NVIDIA L4")
    on_gpu = costs_here(tmp_path, devices=(gpu,))
    assert on_gpu.source.startswith(
        "not measured: roofline estimate for float32 from published bandwidth and FLOPs of L4"
    )
    assert on_gpu.note == "profiles are measured on CPU devices only"
