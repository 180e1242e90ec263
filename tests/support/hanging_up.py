"""Clients that hang up at random: before their request is whole, waiting, in the prefill, in mid-stream, at the end."""

import asyncio
import random
import socket
import struct
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec

_MOST_WAIT_S = 0.4  # the last ones leave well within their streams, or after them
LEVELS = (
    "flexpiped_requests_in_flight",
    "flexpiped_requests_queued",
    "flexpiped_tokens_in_flight",
    "flexpiped_engine_running_requests",
    "flexpiped_engine_waiting_requests",
    "flexpiped_engine_kv_blocks_used",
)


async def visit(url: str, rng: random.Random, *, max_tokens: int) -> None:
    """Send a request to the server at ``url`` (``http://HOST:PORT``) and leave at a random moment, with FIN or RST."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    with socket.socket() as channel:
        channel.setblocking(False)
        await loop.sock_connect(channel, (address.hostname, address.port))
        request = _request(rng, max_tokens=max_tokens)
        whole = rng.random() < 0.95
        await loop.sock_sendall(channel, request if whole else request[: rng.randrange(len(request))])
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(rng.random() * _MOST_WAIT_S):
                while await loop.sock_recv(channel, 1 << 16):
                    pass
        if rng.random() < 0.5:  # RST in place of FIN: what a killed client leaves
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def leave_at_random(url: str, *, clients: int, at_once: int, max_tokens: int) -> None:
    """Have so many clients come and leave, ``at_once`` of them at a time."""
    rng = random.Random(0)

    async def one_after_the_other(count: int) -> None:
        for _ in range(count):
            await visit(url, rng, max_tokens=max_tokens)

    async with asyncio.TaskGroup() as group:
        for place in range(at_once):
            group.create_task(one_after_the_other((clients + place) // at_once))


def _request(rng: random.Random, *, max_tokens: int) -> bytes:
    is_chat = rng.random() < 0.5
    prompt = "x" * rng.randrange(1, 400)  # of one step, or of several
    asked = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    length = {"max_tokens": rng.randint(1, max_tokens), "ignore_eos": True}
    body = msgspec.json.encode({**asked, **length, "stream": rng.random() < 0.7})
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
