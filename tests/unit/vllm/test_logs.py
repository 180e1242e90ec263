"""Lines that vLLM 0.32.0 wrote, understood."""

import pytest

from engines.served.logs import RECENT_S, LastWords, LogLine
from engines.vllm.logs import parse_line, progress_of, takes_long


@pytest.mark.parametrize(
    ("line", "level", "process", "message"),
    [
        ("(EngineCore pid=7) INFO 10-21 12:01:02 [core.py:111] init engine", "info", "EngineCore", "init engine"),
        ("(Worker_PP1 pid=8) WARNING 10-21 12:01:02 [x.py:1] slow", "warning", "Worker_PP1", "slow"),
        ("INFO 10-21 12:01:02 [x.py:1] early", "info", "", "early"),
        ("\x1b[0;36m(X pid=9)\x1b[0;0m \x1b[31mERROR\x1b[0m 10-21 12:01:02 [x.py:1] a", "error", "X", "a"),
        ("(APIServer pid=9) Traceback:", "info", "APIServer", "Traceback:"),
        ("Loading: 100%|####|", "info", "", "Loading: 100%|####|"),
        ("(APIServer pid=9) INFO 10-21 12:01:02 [x.py:1] Route: /docs", "debug", "APIServer", "Route: /docs"),
    ],
)  # fmt: skip
def test_a_line_has_a_level_a_process_and_a_message(line: str, level: str, process: str, message: str) -> None:
    assert parse_line(line + "\r\n") == LogLine(level=level, process=process, message=message)


@pytest.mark.parametrize(
    ("message", "progress"),
    [
        ("Resolved architecture: LlamaForCausalLM", "reading the model's configuration"),
        ("Initializing a V1 LLM engine (v0.32.0) with config: cudagraph_mode", "starting the engine core"),
        ("world_size=2 rank=1 local_rank=1", "starting workers"),
        ("Starting to load model /m...", "loading weights"),
        ("Loading safetensors checkpoint shards:   0% Completed | 0/1", "loading weights"),
        ("Capturing CUDA graphs (mixed prefill-decode)", "capturing CUDA graphs"),
        ("CPU KV cache size: 8,192 tokens", "allocating the KV cache"),
        ("Supported tasks: ['generate']", "starting the server"),
        ("non-default args: {'kv_cache_memory_bytes': 1}", None),
        ("Chunked prefill is enabled", None),
    ],
)
def test_what_a_start_is_doing(message: str, progress: str | None) -> None:
    assert progress_of(LogLine(level="info", process="x", message=message)) == progress
    assert progress_of(LogLine(level="warning", process="x", message=message)) is None


def test_loading_and_compiling_take_long() -> None:
    assert takes_long("loading weights")
    assert takes_long("compiling")
    assert not takes_long("starting the server")


def words(*lines: str) -> str:
    last = LastWords()
    for line in lines:
        last.note(parse_line(line), now_s=0.0)
    return last.said(now_s=0.0)


def test_the_cause_is_the_first_error_not_the_last() -> None:
    assert (
        words(
            "(EngineCore pid=7) ERROR 10-21 12:01:02 [core.py:1] EngineCore failed to start.",
            "(EngineCore pid=7) ERROR 10-21 12:01:02 [core.py:1] Traceback (most recent call last):",
            "(EngineCore pid=7) ERROR 10-21 12:01:02 [core.py:1] ValueError: too little memory",
            "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.",
        )
        == "ValueError: too little memory"
    )


def test_what_pydantic_found_is_on_its_second_line() -> None:
    assert (
        words(
            "(APIServer pid=6) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
            "(APIServer pid=6)   Value error, max_model_len (9) is too great. [type=value_error, input_value=()]",
        )
        == "ValueError: max_model_len (9) is too great."
    )


def test_an_error_line_is_better_than_nothing() -> None:
    assert words("(X pid=1) ERROR 10-21 12:01:02 [x.py:1] it broke", "plain") == "it broke"
    assert words("plain") == ""


def test_a_refused_argument_is_named() -> None:
    refused = "cli.main: error: unrecognized arguments: --nonsense"
    assert words("usage: vllm serve [model_tag] [options]", refused) == refused


def test_what_an_engine_has_survived_is_not_what_it_died_of() -> None:
    last = LastWords()
    last.note(parse_line("ValueError: a start may take long"), now_s=0.0)
    assert last.said(now_s=3600.0) == "ValueError: a start may take long"

    last.ready()
    last.note(parse_line("(EngineCore pid=7) ERROR 10-21 12:01:02 [core.py:1] a request went wrong"), now_s=3600.0)
    last.note(parse_line("KeyError: 'survived'"), now_s=3600.0)

    assert last.said(now_s=3600.0 + RECENT_S) == "KeyError: 'survived'"
    assert last.said(now_s=3601.0 + RECENT_S) == ""
    last.note(parse_line("RuntimeError: out of memory"), now_s=4000.0)
    assert last.said(now_s=4001.0) == "RuntimeError: out of memory"
