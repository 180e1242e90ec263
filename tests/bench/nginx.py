"""nginx as a reverse proxy before the stand-in: one worker, unbuffered, connections to the backend kept."""

import os
import pwd
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tests.bench.plain_server import ServerFailed, free_port, is_up
from tests.bench.processes import leashed

_CONFIGURATION: Final = """\
{user}daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream backend {{ server unix:{socket}; keepalive 512; }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def nginx_path() -> Path | None:
    """Return where nginx is, None where it is not installed (Debian: ``apt-get install nginx-light``)."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    return None if found is None else Path(found)


@asynccontextmanager
async def nginx(binary: Path, socket: Path, folder: Path) -> AsyncIterator[str]:
    """Run nginx before ``socket``, with its files in ``folder``; yield its URL.

    Raises:
        ServerFailed
    """
    port, configuration, log = free_port(), folder / "nginx.conf", folder / "log"
    configuration.write_text(_CONFIGURATION.format(folder=folder, socket=socket, port=port, user=_user()))
    command = [str(binary), "-p", str(folder), "-c", str(configuration), "-e", str(folder / "error.log")]
    async with leashed(command, environment={}, folder=folder, log=log) as process:
        if not await is_up(f"http://127.0.0.1:{port}/health", process):
            raise ServerFailed(log.read_text(errors="replace")[-4000:])
        yield f"http://127.0.0.1:{port}"


def _user() -> str:
    """Return who the worker is to be: started by root, it would be somebody who may not enter the folder."""
    return f"user {pwd.getpwuid(0).pw_name};\n" if os.geteuid() == 0 else ""
