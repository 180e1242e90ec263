"""Where processes listen, as the kernel has it."""

from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

_LISTENS = "0A"


def listening_beyond_loopback(pids: Iterable[int]) -> list[str]:
    """Return the TCP addresses on which processes accept connections from other hosts."""
    found = []
    for pid in pids:
        inodes = set(_socket_inodes(pid))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                host, port = local.split(":")
                if state == _LISTENS and inode in inodes and not _address(host).is_loopback:
                    found.append(f"{_address(host)} port {int(port, 16)} of process {pid}")
    return found


def _socket_inodes(pid: int) -> Iterable[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            if (target := str(entry.readlink())).startswith("socket:["):
                yield target[8:-1]


def _address(words: str) -> IPv4Address | IPv6Address:
    """Return the address of a table in /proc: words of four bytes, each in the machine's order."""
    raw = bytes.fromhex(words)
    address = ip_address(b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4)))
    return getattr(address, "ipv4_mapped", None) or address
