"""Where the admin socket is, and who gets it."""

import os
import socket
import stat
from pathlib import Path

import pytest

from flexpiped.admin_socket import (
    AdminSocketError,
    candidate_sockets,
    default_socket,
    inode_of,
    release_socket,
    take_socket,
)


@pytest.mark.parametrize(
    ("environment", "uid", "path"),
    [
        ({"RUNTIME_DIRECTORY": "/run/flexpiped", "XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/flexpiped/admin.sock"),
        ({"RUNTIME_DIRECTORY": "/run/a:/run/b"}, 0, "/run/a/admin.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/7"}, 7, "/run/user/7/flexpiped/admin.sock"),
        ({}, 0, "/run/user/0/flexpiped/admin.sock"),
        ({}, 987_654, "/tmp/flexpiped-987654/admin.sock"),
    ],
)
def test_the_default_place(environment: dict[str, str], uid: int, path: str) -> None:
    assert default_socket(environment, uid=uid) == Path(path)


def test_flexctl_looks_for_the_users_own_daemon_first() -> None:
    assert candidate_sockets({"XDG_RUNTIME_DIR": "/x"}, uid=7) == (
        Path("/x/flexpiped/admin.sock"),
        Path("/run/flexpiped/admin.sock"),
    )
    assert candidate_sockets({"RUNTIME_DIRECTORY": "/run/flexpiped"}, uid=0) == (Path("/run/flexpiped/admin.sock"),)


def test_only_owner_and_group_may_open_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "admin.sock"
    with take_socket(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750 & ~_umask()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    take_socket(path).close()
    assert path.exists()

    with take_socket(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_socket_is_not(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with take_socket(path), pytest.raises(AdminSocketError, match="another daemon answers"):
        take_socket(path)


def test_a_file_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    path.write_text("precious")

    with pytest.raises(AdminSocketError, match="is not a socket"):
        take_socket(path)
    assert path.read_text() == "precious"


def test_a_path_too_long_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdminSocketError, match="at most 107 bytes"):
        take_socket(tmp_path / ("x" * 120))


def test_a_socket_is_released_only_by_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with take_socket(path):
        inode = inode_of(path)
        release_socket(path, inode=inode + 1)
        assert path.exists()
        release_socket(path, inode=inode)
        assert not path.exists()
        release_socket(path, inode=inode)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
