"""One address for several processes of one daemon, and for no other daemon; and what does not go with them."""

from contextlib import closing

import pytest

from flexpiped.config_file import ConfigError, parse_config
from flexpiped.servers import PortTaken, hold_address, listen_shared, listen_tcp

TRACED = '[http]\ningress_processes = 2\n[tracing]\notlp_endpoint = "http://localhost:4318"\n'


def test_others_may_listen_beside_the_one_that_was_first() -> None:
    with closing(listen_tcp("127.0.0.1", 0, is_shared=True)) as first, closing(hold_address(first)) as held:
        address = held.getsockname()
        with closing(listen_shared(int(held.family), address)) as second:
            assert second.getsockname() == first.getsockname()
            first.close()
            with closing(listen_shared(int(held.family), address)):
                pass


def test_a_second_daemon_is_told_that_the_port_is_taken() -> None:
    with closing(listen_tcp("127.0.0.1", 0, is_shared=True)) as first:
        port = first.getsockname()[1]
        for is_shared in (True, False):
            with pytest.raises(PortTaken, match="Address already in use"):
                listen_tcp("127.0.0.1", port, is_shared=is_shared)


def test_a_port_that_is_not_shared_is_nobodys_to_share() -> None:
    with closing(listen_tcp("127.0.0.1", 0)) as alone, pytest.raises(PortTaken):
        listen_shared(int(alone.family), alone.getsockname())


def test_traces_are_refused_by_name() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(TRACED, file="my.toml")

    [problem] = refused.value.problems
    assert str(problem).startswith("my.toml:2: http.ingress_processes must be 1 with tracing.otlp_endpoint")
