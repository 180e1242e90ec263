"""What the daemon says when it starts."""

import io
from pathlib import Path

from flexpiped.banner import Banner, flexctl_command
from tests.support.clock import Clock


def test_a_quick_start_says_what_is_served_where_and_what_to_type_next() -> None:
    out, clock = io.StringIO(), Clock(100.0)
    banner = Banner(out, command=".venv/bin/flexctl", clock=clock)
    banner.starting(version="0.1.0", engine="native", devices="8 CPU devices", model="etc/demo-model")
    clock.now_s += 1.0
    banner.progress("loading weights")
    clock.now_s += 0.4
    banner.ready(
        facts="demo-model, 8 decoder layers in 2 stages",
        api_url="http://127.0.0.1:8100/v1",
        admin=Path("/run/user/0/flexpiped/admin.sock"),
        next_stages=4,
    )

    assert out.getvalue() == (
        "flexpiped 0.1.0   native engine, 8 CPU devices, model etc/demo-model\n"
        "ready in 1.4 s    API http://127.0.0.1:8100/v1    admin /run/user/0/flexpiped/admin.sock\n"
        "serving demo-model, 8 decoder layers in 2 stages\n"
        "try:  curl -N http://127.0.0.1:8100/v1/completions -H 'content-type: application/json' "
        '-d \'{"prompt": "Once", "max_tokens": 200, "stream": true}\'\n'
        "      .venv/bin/flexctl status\n"
        "      .venv/bin/flexctl rebalance --stages 4 --wait      (while the curl is running)\n"
    )


def test_a_slow_start_shows_how_it_goes() -> None:
    out, clock = io.StringIO(), Clock(100.0)
    banner = Banner(out, command="flexctl", clock=clock)
    banner.progress("planning the layout")
    clock.now_s += 2.0
    banner.show_progress()
    banner.show_progress()
    clock.now_s += 3.0
    banner.progress("loading weights")

    assert out.getvalue() == "   2.0 s  planning the layout\n   5.0 s  loading weights\n"


def test_under_a_service_manager_it_is_silent() -> None:
    banner = Banner(None, command="flexctl")

    banner.starting(version="0.1.0", engine="native", devices="8 CPU devices", model="m")
    banner.say("stopping")

    assert not banner.is_read_live


def test_flexctl_is_named_as_it_can_be_typed(tmp_path: Path) -> None:
    daemon = tmp_path / ".venv" / "bin" / "flexpiped"
    daemon.parent.mkdir(parents=True)
    (daemon.parent / "flexctl").touch()

    assert flexctl_command(daemon, folder=tmp_path, socket=None) == ".venv/bin/flexctl"
    assert flexctl_command(daemon, folder=Path("/elsewhere"), socket=None) == f"{daemon.parent}/flexctl"
    assert flexctl_command(daemon, folder=tmp_path, socket=Path("/x")) == ".venv/bin/flexctl --socket /x"
    assert flexctl_command(tmp_path / "none", folder=tmp_path, socket=None) == "python -m flexpiped.flexctl"


def test_of_several_models_the_one_to_try_is_named() -> None:
    out = io.StringIO()
    socket = Path("/run/flexpiped/admin.sock")
    Banner(out, command="flexctl", clock=Clock(100.0)).ready(
        facts="a (2 stages), b (1 stage)", api_url="http://h/v1", admin=socket, next_stages=4, model="a"
    )

    assert "serving a (2 stages), b (1 stage)\n" in out.getvalue()
    assert '-d \'{"model": "a", "prompt": "Once",' in out.getvalue()
    assert "flexctl rebalance --model a --stages 4 --wait" in out.getvalue()
