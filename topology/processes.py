"""Which processes are ours: a process and all that it started, so that their memory is not taken for other tenants'."""

from pathlib import Path


def family_of(pid: int, *, procfs: Path = Path("/proc")) -> frozenset[int]:
    """Return ``pid`` and its descendants, as procfs shows them now."""
    children: dict[int, list[int]] = {}
    for entry in procfs.iterdir():
        if entry.name.isdecimal() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        each = ahead.pop()
        if each not in found:
            found.add(each)
            ahead += children.get(each, [])
    return frozenset(found)


def _parent(entry: Path) -> int | None:
    try:
        text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return None
    return int(text.rpartition(")")[2].split()[1])  # the name before it may have spaces and brackets
