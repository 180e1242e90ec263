"""Settings of the daemon: what a configuration file can say, with the defaults. ``etc/flexpiped.toml`` explains each.

Each field is annotated with how its value is read. Its TOML key is its name, or the ``Named`` word: a field carries its
unit in its name, while the file writes ``kv_cache = "64 MiB"``. ``flexpiped.settings_keys`` finds them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Final

from flexpiped.config_values import (
    Auto,
    boolean,
    choice,
    integer,
    many_seconds,
    named_texts,
    number,
    optional_path,
    optional_seconds,
    optional_text,
    or_auto,
    or_empty,
    seconds,
    size_bytes,
    text,
    texts,
)
from planner.kv_route import KvPreference
from topology.units import KIB, MIB

DEMO_MODEL: Final = "demo"


class EngineKind(Enum):
    NATIVE = "native"
    VLLM = "vllm"
    SGLANG = "sglang"
    FAKE = "fake"  # no model: counts tokens, for trying the API and for tests


class DType(Enum):
    AUTO = "auto"  # as the checkpoint says
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class SamplingDefaults(Enum):
    MODEL = "model"  # the model's generation_config.json
    API = "api"  # OpenAI's


class ToolFormat(Enum):
    AUTO = "auto"  # as the model's chat template shows it
    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"
    MISTRAL = "mistral"
    MISTRAL_ARGS = "mistral_args"
    QWEN3_CODER = "qwen3_coder"
    OFF = "off"  # tools are refused


class DevicesKind(Enum):
    AUTO = "auto"  # GPUs where there are some and the engine computes on them, else CPU devices
    CPU = "cpu"
    CUDA = "cuda"


class AutoMode(Enum):
    OFF = "off"  # the load is watched, and nothing is decided
    ON = "on"
    DRY_RUN = "dry-run"  # decides and says so, and changes nothing


class LogFormat(Enum):
    AUTO = "auto"  # console on a terminal, else json
    CONSOLE = "console"
    JSON = "json"


class LogLevel(Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class DashboardMode(Enum):
    OFF = "off"  # there is none
    ON = "on"  # it shows; whoever has a key with scope admin may change the layout
    CONTROL = "control"  # where no key is asked for, anybody who reaches the port may


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """The key's word in the file, where that is not the field's name."""

    word: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A reload applies the key while the daemon runs; the others need a restart. On a section: all of its keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """No key by itself: tables whose names are the operator's (``flexpiped.model_settings``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    host: Annotated[str, text] = "127.0.0.1"
    port: Annotated[int, integer(0, 65535)] = 8100
    max_body_bytes: Annotated[int, size_bytes(1024)] = 16 * MIB
    body_deadline_s: Annotated[float, seconds] = 60.0
    max_header_line_bytes: Annotated[int, size_bytes(1024)] = 8 * KIB
    header_deadline_s: Annotated[float, seconds] = 75.0
    send_deadline_s: Annotated[float, seconds] = 60.0
    drain_deadline_s: Annotated[float, seconds, Live()] = 30.0
    tls_certificate: Annotated[Path | None, optional_path, Live()] = None
    tls_key: Annotated[Path | None, optional_path, Live()] = None
    api_keys: Annotated[Path | None, optional_path, Live()] = None
    dashboard: Annotated[DashboardMode, choice(DashboardMode), Live()] = DashboardMode.ON
    ingress_processes: Annotated[int, integer(1, 64)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSettings:
    socket: Annotated[Path | None, optional_path] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionSettings:
    max_requests_in_flight: Annotated[int, integer(1)] = 256
    max_tokens_in_flight: Annotated[int, integer(1)] = 1_000_000
    engine_wait_s: Annotated[float, seconds] = 600.0
    max_requests_queued: Annotated[int, integer(0)] = 256
    queue_deadline_s: Annotated[float, seconds] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    format: Annotated[LogFormat, choice(LogFormat)] = LogFormat.AUTO
    level: Annotated[LogLevel, choice(LogLevel)] = LogLevel.INFO


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalSettings:
    file: Annotated[Path | None, optional_path] = None
    keep_days: Annotated[float, number(0, above=True)] = 90.0
    restore: Annotated[bool, boolean] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    kind: Annotated[DevicesKind, choice(DevicesKind)] = DevicesKind.AUTO
    cpu_count: Annotated[int, integer(1, 256)] = 8
    cpu_memory_bytes: Annotated[int | Auto, or_auto(size_bytes(MIB)), Named(word="cpu_memory")] = Auto.AUTO
    parameter_cache_bytes: Annotated[int | Auto, or_auto(size_bytes(0)), Named(word="parameter_cache")] = Auto.AUTO
    keep_free_bytes: Annotated[int, size_bytes(0), Named(word="keep_free")] = 512 * MIB
    grow_after_s: Annotated[float, number(0)] = 30.0
    slack: Annotated[float, number(0, 0.9)] = 0.1
    move_after_s: Annotated[float, number(0)] = 10.0
    move_again_s: Annotated[float, number(0)] = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeSettings:
    python: Annotated[Path | None, optional_path] = None
    kv_cache_bytes: Annotated[int, size_bytes(64 * 1024), Named(word="kv_cache")] = 64 * MIB
    kv_cache_per_device_bytes: Annotated[
        int | Auto, or_auto(size_bytes(64 * 1024)), Named(word="kv_cache_per_device")
    ] = Auto.AUTO
    kv_block_tokens: Annotated[int, integer(1, 1024)] = 16
    prefix_caching: Annotated[bool, boolean] = True
    max_num_seqs: Annotated[int, integer(1)] = 64
    max_num_batched_tokens: Annotated[int, integer(1)] = 512
    max_micro_batches: Annotated[int | Auto, or_auto(integer(1, 64))] = Auto.AUTO
    threads: Annotated[int | Auto, or_auto(integer(1, 1024))] = Auto.AUTO
    threads_per_device: Annotated[int | Auto, or_auto(integer(1, 1024))] = Auto.AUTO
    nice: Annotated[int, integer(0, 19)] = 10
    hang_deadline_s: Annotated[float, seconds] = 60.0
    cache_dir: Annotated[Path | None, optional_path] = None
    adapters: Annotated[Mapping[str, str], named_texts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSettings:
    """Of an engine with a server and an environment of its own."""

    python: Annotated[Path | None, optional_path] = None
    kv_cache_bytes: Annotated[int | Auto, or_auto(size_bytes(64 * 1024)), Named(word="kv_cache")] = Auto.AUTO
    kv_block_tokens: Annotated[int, integer(1, 1024)] = 32
    max_num_seqs: Annotated[int, integer(1)] = 64
    max_num_batched_tokens: Annotated[int, integer(1)] = 2048
    tensor_parallel: Annotated[int, integer(1, 64)] = 1
    ranks: Annotated[int | Auto, or_auto(integer(1, 64))] = Auto.AUTO
    threads: Annotated[int | Auto, or_auto(integer(1, 1024))] = Auto.AUTO
    nice: Annotated[int, integer(0, 19)] = 10
    start_deadline_s: Annotated[float, seconds] = 600.0
    hang_deadline_s: Annotated[float, seconds] = 60.0
    args: Annotated[tuple[str, ...], texts] = ()
    env: Annotated[Mapping[str, str], named_texts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings(ServedSettings):
    compile: Annotated[bool, boolean] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangSettings(ServedSettings):
    kv_block_tokens: Annotated[int, integer(1, 1024)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginesSettings:
    survive_restart: Annotated[bool, boolean] = False
    adopt_within_s: Annotated[float, seconds] = 300.0
    native: NativeSettings = field(default_factory=NativeSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)
    sglang: SglangSettings = field(default_factory=SglangSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverSettings:
    prepare_deadline_s: Annotated[float, seconds] = 120.0
    sync_deadline_s: Annotated[float, seconds] = 120.0
    commit_deadline_s: Annotated[float, seconds] = 5.0
    max_rounds: Annotated[int, integer(1, 100)] = 8
    remainder_slots: Annotated[int, integer(0)] = 256
    slice_bytes: Annotated[int, size_bytes(4096)] = 512 * KIB
    copy_bytes_per_s: Annotated[int | Auto, or_auto(size_bytes(64 * KIB)), Named(word="copy_per_s")] = Auto.AUTO
    kv: Annotated[KvPreference, choice(KvPreference)] = KvPreference.AUTO
    drain_deadline_s: Annotated[float, seconds] = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSettings:
    rate_per_s: Annotated[float, number(0, above=True)] = 1.0
    cv: Annotated[float, number(0)] = 1.0
    prompt_tokens_mean: Annotated[float, number(1), Named(word="prompt_tokens")] = 256.0
    output_tokens_mean: Annotated[float, number(1), Named(word="output_tokens")] = 128.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingSettings:
    otlp_endpoint: Annotated[str | None, optional_text] = None
    sample_ratio: Annotated[float, number(0, 1)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSettings:
    ttft_s: Annotated[float | None, optional_seconds] = None
    tpot_s: Annotated[float | None, optional_seconds] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    deadline_s: Annotated[float, seconds] = 5.0
    headroom: Annotated[float, number(0, 0.9)] = 0.05
    nested_loss: Annotated[float, number(0)] = 0.05
    risk_s: Annotated[float, number(0)] = 0.001
    whole_device_points: Annotated[int, integer(0)] = 400
    whole_island_points: Annotated[int, integer(0)] = 800
    shared_device_points: Annotated[int, integer(0)] = 100
    shared_per_cv2: Annotated[float, number(0)] = 0.35
    scaled_path_points: Annotated[int, integer(0)] = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSettings:
    """Of the control loop and the policy; ``planner.policy_state`` has the reason of each default of the policy."""

    mode: Annotated[AutoMode, choice(AutoMode)] = AutoMode.OFF
    interval_s: Annotated[float, seconds] = 5.0
    windows_s: Annotated[tuple[float, ...], many_seconds] = (30.0, 180.0, 1800.0)
    cv_window_s: Annotated[float, seconds] = 180.0
    latency_window_s: Annotated[float, seconds] = 60.0
    stale_after_s: Annotated[float, seconds] = 15.0
    alpha: Annotated[float, number(0, 1)] = 0.5
    sigma: Annotated[float, number(0, above=True)] = 4.0
    beta1: Annotated[float, number(0, above=True)] = 1.0
    beta2: Annotated[float, number(0)] = 0.0
    shared: Annotated[float, number(0)] = 0.02
    shared_per_cv2: Annotated[float, number(0)] = 0.35
    load_limit: Annotated[float, number(0, 1, above=True)] = 0.9
    target_load: Annotated[float, number(0, 1, above=True)] = 0.75
    min_gain: Annotated[float, number(0)] = 0.15
    confirm_s: Annotated[float, number(0)] = 10.0
    dwell_s: Annotated[float, number(0)] = 60.0
    cool_down_s: Annotated[float, number(0)] = 15.0
    changes_per_min: Annotated[int, integer(1)] = 2
    expected_dwell_s: Annotated[float, seconds] = 180.0
    guard_s: Annotated[float, seconds] = 30.0
    guard_tolerance: Annotated[float, number(0)] = 0.25
    bar_s: Annotated[float, seconds] = 600.0
    add_again_s: Annotated[float, seconds] = 60.0
    min_replicas: Annotated[int, integer(0)] = 1
    max_replicas: Annotated[int, integer(1)] = 1
    late_share: Annotated[float, number(0, 1, above=True)] = 0.05
    reclaim_s: Annotated[float, number(0)] = 300.0
    deadline_s: Annotated[float, seconds] = 30.0
    idle_s: Annotated[float, seconds] = 300.0
    beta: Annotated[float, number(0), Named(word="queue_beta")] = 7 / 3
    gamma: Annotated[float, number(0), Named(word="queue_gamma")] = 3.045
    queue_full: Annotated[float, number(0, above=True)] = 64.0
    due_share: Annotated[float, number(0, above=True)] = 1.0
    held_weight: Annotated[float, number(0)] = 1.0
    held_fades_per_s: Annotated[float, number(0)] = 0.00231
    free_weight: Annotated[float, number(0)] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a configuration file can say."""

    model: Annotated[str, text] = DEMO_MODEL
    served_model_name: Annotated[str | None, optional_text] = None
    engine: Annotated[EngineKind, choice(EngineKind)] = EngineKind.NATIVE
    stages: Annotated[int | Auto | None, or_empty(or_auto(integer(1)))] = None
    dtype: Annotated[DType, choice(DType)] = DType.AUTO
    max_model_len: Annotated[int | Auto, or_auto(integer(1))] = Auto.AUTO
    sampling_defaults: Annotated[SamplingDefaults, choice(SamplingDefaults)] = SamplingDefaults.MODEL
    tool_format: Annotated[ToolFormat, choice(ToolFormat)] = ToolFormat.AUTO
    revision: Annotated[str | None, optional_text] = None
    tokenizer: Annotated[str | None, optional_text] = None
    trust_remote_code: Annotated[bool, boolean] = False
    hf_token_file: Annotated[Path | None, optional_path] = None
    http: HttpSettings = field(default_factory=HttpSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    admission: Annotated[AdmissionSettings, Live()] = field(default_factory=AdmissionSettings)
    log: Annotated[LogSettings, Live()] = field(default_factory=LogSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    journal: JournalSettings = field(default_factory=JournalSettings)
    devices: DeviceSettings = field(default_factory=DeviceSettings)
    engines: EnginesSettings = field(default_factory=EnginesSettings)
    handover: HandoverSettings = field(default_factory=HandoverSettings)
    workload: Annotated[WorkloadSettings, Live()] = field(default_factory=WorkloadSettings)
    slo: Annotated[SloSettings, Live()] = field(default_factory=SloSettings)
    planner: Annotated[PlannerSettings, Live()] = field(default_factory=PlannerSettings)
    auto: AutoSettings = field(default_factory=AutoSettings)
    # Of each [models.NAME] table the values of the keys that stand in it.
    models: Annotated[Mapping[str, Mapping[str, object]], Tables()] = field(default_factory=dict)
