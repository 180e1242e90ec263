"""The Map in the README has one line for each file of the packages, and none for a file that is gone; links lead on."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("topology", "planner", "engines", "flexpiped")


def mapped_files() -> set[str]:
    found: set[str] = set()
    folder = ""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"\*\*(\S+?)/\*\*", line):
            folder = heading[1]
        elif folder and (entry := re.match(r"- `(\S+?)` ", line)):
            found.add(f"{folder}/{entry[1]}")
    return found


def test_every_file_has_its_line() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.c", "*.html", "*.css", "*.js")
        for path in (ROOT / package).rglob(pattern)
        if path.name != "__init__.py"
    }

    assert files - mapped_files() == set()


def test_every_line_has_its_file() -> None:
    assert {name for name in mapped_files() if not (ROOT / name).exists()} == set()


def test_links_within_it_lead_to_headings() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }

    assert set(re.findall(r"\(#([^)]+)\)", text)) - headings == set()
