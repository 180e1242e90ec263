"""The static files: all there, nothing from elsewhere, nothing inline, all of it in the package."""

import re
import tomllib
from pathlib import Path

from flexpiped.dashboard.pages import SECURITY_HEADERS, load_pages

ROOT = Path(__file__).parents[3]
STATIC = ROOT / "flexpiped" / "dashboard" / "static"
PAGES = {name: page.body.decode() for name, page in load_pages().items()}
SCRIPTS = {name: text for name, text in PAGES.items() if name.endswith(".js")}
MAKES_MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc")


def test_every_file_is_served_and_no_other() -> None:
    assert set(PAGES) == {path.name for path in STATIC.iterdir()}


def test_every_reference_is_to_a_file_that_is_there() -> None:
    named = {name: re.findall(r'(?:src|href)="([^"#][^"]*)"', text) for name, text in PAGES.items() if ".html" in name}
    assert {Path(each).name for each in named["index.html"]} <= set(PAGES)
    assert all(each.startswith("dashboard/app/") for each in named["index.html"])
    imported = {each for text in SCRIPTS.values() for each in re.findall(r'from "\./([^"]+)"', text)}
    assert imported <= set(SCRIPTS)
    assert set(SCRIPTS) - imported == {"main.js", "first_paint.js"}, "a module that nobody imports"


def test_nothing_comes_from_elsewhere() -> None:
    names = {name: re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"']*", text) for name, text in PAGES.items()}
    allowed = {"http://www.w3.org/2000/svg"}  # a name, which nobody asks for anything
    assert {name: set(found) - allowed for name, found in names.items() if set(found) - allowed} == {}
    assert not re.search(r"@import|url\(", "".join(text for name, text in PAGES.items() if name.endswith(".css")))


def test_nothing_is_inline_and_text_never_becomes_markup() -> None:
    page = PAGES["index.html"]
    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", page) == []
    assert {name for name, text in SCRIPTS.items() if MAKES_MARKUP.search(text)} == set()
    assert {name for name, text in SCRIPTS.items() if re.search(r"\bstyle: |\"style\"", text)} == set()


def test_the_policy_allows_this_origin_only() -> None:
    policy = dict(part.split(" ", 1) for part in SECURITY_HEADERS["Content-Security-Policy"].split("; "))

    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert (policy["frame-ancestors"], policy["base-uri"]) == ("'none'", "'none'")
    assert not re.search(r"unsafe|\*|data:|https?:", " ".join(policy.values()))


def test_they_are_part_of_the_package() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert "dashboard/static/*" in setup["tool"]["setuptools"]["package-data"]["flexpiped"]


def test_no_file_is_long() -> None:
    assert {name: text.count("\n") for name, text in PAGES.items() if text.count("\n") > 200} == {}
