"""What ranks answer the conductor: a datagram for each, and a file where the answer is long."""

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexpiped_served.staging import bind_datagram

SOCKET = "core.dgram"
_LONGEST = 32 << 10
_RECEIVE_BYTES = 1 << 16
Answer = dict[str, Any]


class AnswerSender:
    """A rank's side."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send(self, ticket: int, answer: Answer) -> None:
        data = json.dumps(answer).encode()
        if len(data) > _LONGEST:
            file = self._directory / f"answer-{self._rank}-{ticket}.json"
            file.write_bytes(data)
            data = json.dumps({"file": str(file)}).encode()
        head = json.dumps([ticket, self._rank]).encode()
        self._socket.sendto(head + b"\n" + data, str(self._directory / SOCKET))


class AnswerReceiver:
    """The conductor's side: a thread that gives ``on_answer`` the ticket, the rank and the answer."""

    def __init__(self, directory: Path, on_answer: Callable[[int, int, Answer], None]) -> None:
        self._socket = bind_datagram(directory / SOCKET)
        self._on_answer = on_answer
        threading.Thread(target=self._run, name="flexpiped-answers", daemon=True).start()

    def _run(self) -> None:
        while True:
            head, _, data = self._socket.recv(_RECEIVE_BYTES).partition(b"\n")
            ticket, rank = json.loads(head)
            answer: Answer = json.loads(data)
            if "file" in answer:
                file = Path(answer["file"])
                answer = json.loads(file.read_bytes())
                file.unlink()
            self._on_answer(ticket, rank, answer)
