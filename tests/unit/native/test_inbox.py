"""Inboxes: whole messages, in each sender's order, from any number of processes and threads."""

import os
from collections.abc import Iterator
from threading import Thread

import pytest

from engines.native.inbox import Inbox


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox()
    yield inbox
    inbox.close()


def message_of(sender: int, number: int) -> bytes:
    """Return a message whose length and every byte say who sent it, and its place in the order."""
    return bytes([sender]) * (1 + (sender * 37 + number * 101) % 700) + number.to_bytes(4, "little")


def send_all(inbox: Inbox, sender: int, count: int) -> None:
    for number in range(count):
        inbox.send(message_of(sender, number))


def assert_whole_and_in_order(inbox: Inbox, *, senders: int, count: int) -> None:
    expected = [0] * senders
    for _ in range(senders * count):
        message = inbox.receive()
        sender = message[0]
        assert message == message_of(sender, expected[sender])
        expected[sender] += 1
    assert inbox.receive_now() is None


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # the child does next to nothing
def test_messages_of_processes_are_whole_and_in_order(inbox: Inbox) -> None:
    children = []
    for sender in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                send_all(inbox, sender, 300)
            finally:
                os._exit(0)
        children.append(pid)
    assert_whole_and_in_order(inbox, senders=4, count=300)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4


def test_messages_of_threads_are_whole_and_in_order(inbox: Inbox) -> None:
    threads = [Thread(target=send_all, args=(inbox, sender, 300)) for sender in range(4)]
    for thread in threads:
        thread.start()
    assert_whole_and_in_order(inbox, senders=4, count=300)
    for thread in threads:
        thread.join()


def test_a_large_message_arrives_whole(inbox: Inbox) -> None:
    message = os.urandom(100_000)
    inbox.send(message)
    assert inbox.receive() == message


def test_an_empty_inbox_does_not_block_who_only_looks(inbox: Inbox) -> None:
    assert inbox.receive_now() is None
    inbox.send(b"a")
    assert inbox.receive_now() == b"a"
    assert inbox.receive_now() is None


def test_what_a_dead_reader_left_is_discarded(inbox: Inbox) -> None:
    for _ in range(20):
        inbox.send(b"stale")
    inbox.discard_all()
    inbox.send(b"new")
    assert inbox.receive() == b"new"


def test_an_inbox_can_be_waited_on(inbox: Inbox) -> None:
    os.set_blocking(inbox.fileno(), True)  # it is a descriptor
    inbox.send(b"a")
    assert os.read(inbox.fileno(), 10) == b"a"
