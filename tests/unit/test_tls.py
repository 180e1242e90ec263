"""A certificate on the HTTP port over real TLS sockets: served, replaced while connections are open, refused."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from flexpiped.reload import compare
from flexpiped.servers import listen_tcp, serving, url_of
from flexpiped.settings import HttpSettings, Settings
from flexpiped.tls import LiveTls, TlsError, load_tls
from tests.support.certificates import make_certificate

pytestmark = pytest.mark.real_loop
Files = tuple[Path, Path]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_certificate(tmp_path_factory.mktemp("tls"), "old")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_certificate(tmp_path_factory.mktemp("tls"), "new")


def live(files: Files) -> LiveTls:
    context = load_tls(*files)
    assert context is not None
    return LiveTls(context)


async def hello(_request: web.Request) -> web.Response:
    return web.Response(text="hello")


@pytest.fixture
async def port(old: Files) -> AsyncIterator[tuple[str, LiveTls]]:
    app, tls, listener = web.Application(), live(old), listen_tcp("127.0.0.1", 0)
    app.add_routes([web.get("/", hello)])
    url = url_of(listener, is_tls=True)
    assert url.startswith("https://127.0.0.1:")
    async with serving(app, listener, shutdown_s=1.0, tls=tls.front):
        yield url, tls


def trusting(files: Files) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=files[0])


async def test_the_certificate_is_replaced_while_connections_are_open(
    port: tuple[str, LiveTls], old: Files, new: Files
) -> None:
    (url, tls), trusts_old = port, trusting(old)
    async with aiohttp.ClientSession() as open_before, aiohttp.ClientSession() as later:
        async with open_before.get(url, ssl=trusts_old) as answer:
            assert await answer.text() == "hello"
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await later.get(url, ssl=trusting(new))
        context = load_tls(*new)
        assert context is not None
        tls.current = context
        async with later.get(url, ssl=trusting(new)) as answer:
            assert await answer.text() == "hello"
        async with open_before.get(url, ssl=trusts_old) as answer:  # on the connection that it has
            assert await answer.text() == "hello"


async def test_plain_http_gets_nothing(port: tuple[str, LiveTls]) -> None:
    url, _tls = port
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(url.replace("https", "http"))


def test_one_file_may_hold_both(old: Files, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text(old[0].read_text() + old[1].read_text())
    assert load_tls(both, None) is not None
    assert load_tls(None, None) is None


def test_files_that_cannot_be_used_are_named(old: Files, new: Files, tmp_path: Path) -> None:
    junk, locked = tmp_path / "junk.pem", tmp_path / "locked.key"
    junk.write_text("no certificate")
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    for files, said in (
        ((tmp_path / "gone.crt", None), "gone.crt: No such file"),
        ((old[0], tmp_path / "gone.key"), "gone.key: No such file"),
        ((junk, None), "junk.pem: no certificate with its key"),
        ((old[0], new[1]), "no certificate with its key: KEY_VALUES_MISMATCH"),
        ((old[0], None), "no certificate with its key"),
    ):
        with pytest.raises(TlsError, match=said):
            load_tls(*files)


def settings(certificate: Path | None, key: Path | None) -> Settings:
    return Settings(http=HttpSettings(tls_certificate=certificate, tls_key=key))


def written(folder: Path, certificate: Path, key: Path) -> Path:
    file = folder / "my.toml"
    file.write_text(f'[http]\ntls_certificate = "{certificate}"\ntls_key = "{key}"\n')
    return file


def test_a_reload_takes_another_certificate(old: Files, new: Files, tmp_path: Path) -> None:
    report = compare(settings(*old), written(tmp_path, *new))
    assert report.names(live=True) == ("http.tls_certificate", "http.tls_key")
    assert (report.settings, report.tls is None) == (settings(*new), False)


def test_a_reload_reads_the_same_files_again(old: Files, tmp_path: Path) -> None:
    report = compare(settings(*old), written(tmp_path, *old))
    assert (report.changes, report.tls is None) == ((), False)


def test_to_begin_tls_needs_a_restart(old: Files, tmp_path: Path) -> None:
    report = compare(Settings(), written(tmp_path, *old))
    assert report.names(live=False) == ("http.tls_certificate", "http.tls_key")
    assert report.settings == Settings()


def test_a_wrong_certificate_leaves_the_old_one(old: Files, new: Files, tmp_path: Path) -> None:
    report = compare(settings(*old), written(tmp_path, old[0], new[1]))
    assert report.settings == settings(*old)
    assert report.problems[0].startswith(f"http.tls_certificate: {old[0]}: no certificate with its key")


def test_a_key_needs_its_certificate(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('[http]\ntls_key = "x.key"\n')
    assert compare(Settings(), file).problems == (f"{file}:2: http.tls_key needs http.tls_certificate",)
