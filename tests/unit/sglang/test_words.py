"""What SGLang 0.5.23 writes, understood; and a request in its words."""

from dataclasses import replace

import pytest

from engines.errors import InvalidRequest
from engines.protocol import GenerationRequest, SamplingParams
from engines.served.logs import LastWords, LogLine
from engines.sglang.logs import parse_line, progress_of, takes_long
from engines.sglang.sampling import parameter_of, to_sglang


@pytest.mark.parametrize(
    ("line", "level", "process", "message"),
    [
        ("[2026-11-24 17:40:42 PP0] Init parallel begin.", "info", "PP0", "Init parallel begin."),
        ("[2026-11-24 17:40:42 PP0 TP1] Memory pool end.", "info", "PP0 TP1", "Memory pool end."),
        ("[2026-11-24 17:40:42.123 PP0] Memory pool end.", "info", "PP0", "Memory pool end."),  # SGLANG_LOG_MS
        ("[2026-11-24 17:38:51] server_args={'a': 1}", "debug", "", "server_args={'a': 1}"),
        ("[2026-11-24 17:40:53] INFO:      - \"GET /model_info HTTP/1.1\" 200 OK", "debug", "",
         '- "GET /model_info HTTP/1.1" 200 OK'),
        ("[2026-11-24 17:40:53] ERROR:    it broke", "error", "", "it broke"),
        ("[2026-11-24 17:41:19 PP0] Scheduler hit an exception: Traceback (most recent call last):", "error", "PP0",
         "Scheduler hit an exception: Traceback (most recent call last):"),
        ("/x/awq.py:53: UserWarning: Only CUDA, HIP and XPU support AWQ currently.", "warning", "",
         "/x/awq.py:53: UserWarning: Only CUDA, HIP and XPU support AWQ currently."),
        ("RuntimeError: out of memory", "info", "", "RuntimeError: out of memory"),
    ],
)  # fmt: skip
def test_a_line_has_a_level_a_process_and_a_message(line: str, level: str, process: str, message: str) -> None:
    assert parse_line(line + "\r\n") == LogLine(level=level, process=process, message=message)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("ServerArgs(api_key='s1', admin_api_key=\"s2\", tp=1)", "ServerArgs(api_key=***, admin_api_key=***, tp=1)"),
        ("{'api_key': 's1', 'admin_api_key': 's2', 'tp': 1}", "{'api_key': ***, 'admin_api_key': ***, 'tp': 1}"),
        ("ServerArgs(api_key=s1, admin_api_key=s2)", "ServerArgs(api_key=***, admin_api_key=***)"),
    ],
)  # fmt: skip
def test_keys_do_not_get_into_the_log(said: str, kept: str) -> None:
    line = parse_line(f"[2026-11-24 17:38:51] server_args={said}")
    assert line == LogLine(level="debug", process="", message=f"server_args={kept}")


def test_what_a_start_is_doing() -> None:
    said = [
        "[2026-11-24 17:38:53] server_args={}",
        "[2026-11-24 17:40:42 PP0] Init parallel begin.",
        "[2026-11-24 17:40:50 PP0] Load weight begin. avail mem=18.02 GB",
        "[2026-11-24 17:40:53 PP0] something else",
    ]
    assert [progress_of(parse_line(line)) for line in said] == [
        "reading the model's configuration",
        "starting ranks",
        "loading weights",
        None,
    ]
    assert takes_long("loading weights")


def test_a_scheduler_is_remembered_by_what_ended_it() -> None:
    words = LastWords()
    for line in (
        "[2026-11-24 17:41:19 PP0] Scheduler hit an exception: Traceback (most recent call last):",
        '  File "/x/scheduler.py", line 6368, in run_scheduler_process',
        "AttributeError: no such kernel",
        "[2026-11-24 17:41:21] SIGQUIT received. It usually means one child failed.",
    ):
        words.note(parse_line(line), now_s=0.0)
    assert words.said(now_s=0.0) == "AttributeError: no such kernel"


SAMPLING = SamplingParams(
    max_tokens=20, temperature=0.5, top_p=0.9, top_k=7, seed=(1 << 63) + 5, stop_token_ids=(4,), ignore_eos=True
)
REQUEST = GenerationRequest(request_id="x", prompt_token_ids=(1, 2), sampling=SAMPLING, generated_token_ids=(3, 3))


def test_every_sampling_parameter_reaches_sglang() -> None:
    assert to_sglang(REQUEST, max_tokens=18) == {
        "max_new_tokens": 18,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "sampling_seed": 5,
        "stop_token_ids": [4],
        "ignore_eos": True,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    assert to_sglang(replace(REQUEST, sampling=replace(SAMPLING, top_k=0)), max_tokens=1)["top_k"] == -1


def test_parameters_of_the_api_have_their_own_names_there() -> None:
    sampling = replace(SAMPLING, engine_params={"min_tokens": 5, "min_p": 0.1})
    wire = to_sglang(replace(REQUEST, sampling=sampling), max_tokens=18)
    assert (wire["min_new_tokens"], wire["min_p"]) == (3, 0.1)


def test_what_sglang_does_not_know_is_refused_by_name() -> None:
    sampling = replace(SAMPLING, engine_params={"bad_words": ["x"]})
    with pytest.raises(InvalidRequest, match="SGLang has no parameter bad_words") as caught:
        to_sglang(replace(REQUEST, sampling=sampling), max_tokens=18)
    assert caught.value.parameter == "bad_words"


@pytest.mark.parametrize(
    ("message", "parameter"),
    [
        ("top_p must be in (0, 1], got 4.", "top_p"),
        ("min_new_tokens must be in [0, max_new_tokens(2)], got 3.", "min_tokens"),
        ("The input is too long.", "prompt"),
    ],
)
def test_whom_a_refusal_is_about(message: str, parameter: str) -> None:
    assert parameter_of(message) == parameter
