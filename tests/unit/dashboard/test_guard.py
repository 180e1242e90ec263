"""Who may plan and change from the dashboard: the rules, as tables."""

import pytest

from flexpiped.dashboard.guard import why_no_change, why_not_ours
from flexpiped.settings import DashboardMode

JSON = {"Content-Type": "application/json", "Host": "127.0.0.1:8100"}
NAMED = {"Content-Type": "application/json; charset=utf-8", "Host": "gpu7.example.org"}


@pytest.mark.parametrize(
    ("headers", "asks_for_keys", "reason"),
    [
        (JSON, False, ""),
        (JSON | {"Origin": "http://127.0.0.1:8100", "Sec-Fetch-Site": "same-origin"}, False, ""),
        (JSON | {"Host": "[::1]:8100"}, False, ""),
        (JSON | {"Host": "localhost"}, False, ""),
        (NAMED, True, ""),
        (NAMED | {"Origin": "https://GPU7.example.org"}, True, ""),
        (NAMED, False, "the host must be an address"),
        (JSON | {"Host": "rebound.example.org", "Origin": "http://rebound.example.org"}, False, "must be an address"),
        (JSON | {"Host": "localhost.example.org"}, False, "must be an address"),
        (JSON | {"Host": ""}, False, "must be an address"),
        (JSON | {"Host": "[broken"}, False, "must be an address"),
        (JSON | {"Content-Type": "text/plain"}, False, "must be application/json"),
        (JSON | {"Content-Type": "application/x-www-form-urlencoded"}, True, "must be application/json"),
        ({"Host": "127.0.0.1"}, False, "must be application/json"),
        (JSON | {"Origin": "http://127.0.0.1:9999"}, False, "another origin"),
        (JSON | {"Origin": "null"}, False, "another origin"),
        (JSON | {"Origin": "https://evil.example.org"}, True, "another origin"),
        (JSON | {"Sec-Fetch-Site": "cross-site"}, False, "another origin"),
        (JSON | {"Sec-Fetch-Site": "same-site"}, True, "another origin"),
    ],
)
def test_what_comes_from_the_page_itself(headers: dict[str, str], asks_for_keys: bool, reason: str) -> None:
    found = why_not_ours(headers, asks_for_keys=asks_for_keys)

    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("mode", "asks_for_keys", "is_admin", "may"),
    [
        (DashboardMode.ON, True, True, True),
        (DashboardMode.ON, True, False, False),
        (DashboardMode.ON, False, True, False),  # where no key is asked for, anybody counts as having all scopes
        (DashboardMode.CONTROL, False, True, True),
        (DashboardMode.CONTROL, True, False, False),
    ],
)
def test_who_may_change_the_layout(mode: DashboardMode, asks_for_keys: bool, is_admin: bool, may: bool) -> None:
    assert (why_no_change(mode, asks_for_keys=asks_for_keys, is_admin=is_admin) == "") is may
