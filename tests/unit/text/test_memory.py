"""What a text process takes does not grow with the streams that it has served."""

import itertools
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines.text.wire import Close, Feed, FrameReader, Open, Request, pack, unpack_replies
from tests.bench.processes import unshared_bytes
from tests.support.tiny_tokenizer import write_model_directory

ROOT = Path(__file__).parents[3]
RECEIVE_BYTES = 1 << 18
WARM, MORE = 3_000, 30_000
LIMIT_BYTES = 300_000  # a heap that grew by 40 bytes with each stream would be well beyond


class Text:
    """A text process, and streams of two tokens each."""

    def __init__(self, process: "subprocess.Popen[bytes]", channel: socket.socket) -> None:
        self.process = process
        self._channel = channel
        self._reader = FrameReader()
        self._numbers = itertools.count()
        self._draw = random.Random(0)
        self.expect(1)  # that it is ready

    def expect(self, replies: int) -> None:
        while replies > 0:
            for body in self._reader.feed(self._channel.recv(RECEIVE_BYTES)):
                replies -= len(unpack_replies(body))

    def serve(self, streams: int) -> None:
        """Have that many streams served, in bursts of few and of many."""
        while streams > 0:
            burst = [next(self._numbers) for _ in range(self._draw.choice((1, 2, 5, 20, 64, 200)))]
            streams -= len(burst)
            self._send([Open(each, (1, 2, 3), (), 0, (), False) for each in burst])
            self._feed(burst, final=False)
            self._feed(burst, final=True)
            self._send([Close(each) for each in burst])

    def _feed(self, burst: list[int], *, final: bool) -> None:
        self._send([Feed(each, (20 + each % 200,), final) for each in burst])
        self.expect(len(burst))

    def _send(self, requests: list[Request]) -> None:
        self._channel.sendall(pack(requests))


@contextmanager
def text_process(model: Path) -> Iterator[Text]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = "import os, sys; from engines.text.process import main; sys.argv[3] = str(os.getppid()); main()"
        process = subprocess.Popen(
            [sys.executable, "-c", command, str(model), str(theirs.fileno()), ""],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
        )
        try:
            yield Text(process, ours)
        finally:
            process.kill()
            process.wait()


@pytest.mark.real_loop
def test_it_takes_no_more_after_many_streams(tmp_path: Path) -> None:
    with text_process(write_model_directory(tmp_path)) as text:
        text.serve(WARM)
        before = unshared_bytes([text.process.pid])
        text.serve(MORE)
        assert unshared_bytes([text.process.pid]) - before < LIMIT_BYTES
