"""A reload applies what is live, says what waits for a restart, and a wrong file changes nothing."""

from pathlib import Path

from flexpiped.config_file import parse_config
from flexpiped.reload import compare
from flexpiped.settings import Settings
from flexpiped.settings_keys import KEYS


def written(folder: Path, text: str) -> Path:
    file = folder / "my.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_live_keys_are_applied_and_the_others_wait(tmp_path: Path) -> None:
    file = written(tmp_path, "stages = 3\nadmission.max_requests_in_flight = 7\nslo.ttft_s = 0.5\n")

    report = compare(Settings(), file)

    assert report.names(live=True) == ("admission.max_requests_in_flight", "slo.ttft_s")
    assert report.names(live=False) == ("stages",)
    assert report.settings == parse_config("admission.max_requests_in_flight = 7\nslo.ttft_s = 0.5", file="")
    assert report.message == (
        "configuration changed, applied: admission.max_requests_in_flight, slo.ttft_s; restart to apply: stages"
    )
    assert report.to_wire()["changes"][1] == {
        "key": "admission.max_requests_in_flight",
        "before": "256",
        "after": "7",
        "live": True,
    }


def test_what_waits_goes_on_waiting_over_further_reloads(tmp_path: Path) -> None:
    file = written(tmp_path, "stages = 3\nadmission.max_requests_in_flight = 7\n")

    first = compare(Settings(), file)
    second = compare(first.settings, file)

    assert (second.names(live=True), second.names(live=False)) == ((), ("stages",))


def test_a_wrong_file_changes_nothing_and_every_mistake_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "stagse = 3\nadmission.max_requests_in_flight = 0\n")

    report = compare(Settings(), file)

    assert (report.settings, report.changes) == (Settings(), ())
    assert [problem.partition(": ")[0] for problem in report.problems] == [f"{file}:1", f"{file}:2"]
    assert report.message.startswith("configuration rejected, the old one stays in force: ")


def test_a_file_that_is_gone_is_a_problem_and_none_is_said(tmp_path: Path) -> None:
    assert "cannot be read" in compare(Settings(), tmp_path / "gone.toml").problems[0]
    assert compare(Settings(), None).message == "there is no configuration file to read again"


def test_sections_are_live_as_a_whole() -> None:
    whole = {"admission", "log", "workload", "slo", "planner"}

    live = {key.name for key in KEYS if key.is_live}
    assert live == {key.name for key in KEYS if key.name.partition(".")[0] in whole} | {
        *("http.api_keys", "http.dashboard", "http.drain_deadline_s", "http.tls_certificate", "http.tls_key")
    }
