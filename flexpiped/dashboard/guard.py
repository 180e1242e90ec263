"""Which requests may change something, besides having the right key. Pure.

A browser sends what any page that it shows tells it to send, also to this host. So what plans or changes must come from
the dashboard's own page: in JSON, which another origin's page may not send unasked, and from the origin that it is sent
to. Where no key is asked for, that origin must be an address or ``localhost``: a name that somebody else owns may point
to this host, and its page would be of the same origin.
"""

from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from flexpiped.settings import DashboardMode


def why_not_ours(headers: Mapping[str, str], *, asks_for_keys: bool) -> str:
    """Return why a request that plans or changes is not taken; empty: it is."""
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        return "the body must be application/json"
    if headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return "it comes from a page of another origin"
    host, origin = headers.get("Host", ""), headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return "it comes from a page of another origin"
    if not asks_for_keys and not _is_address(host):
        return f"no API key is asked for, so the host must be an address or localhost, not {host}"
    return ""


def why_no_change(mode: DashboardMode, *, asks_for_keys: bool, is_admin: bool) -> str:
    """Return why nothing may be changed from the dashboard; empty: it may."""
    if asks_for_keys:
        return "" if is_admin else "changing the layout needs an API key with scope admin"
    if mode is DashboardMode.CONTROL:
        return ""
    return 'changing the layout needs API keys (http.api_keys), or http.dashboard = "control"'


def _is_address(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ip_address(name))
    except ValueError:
        return False
