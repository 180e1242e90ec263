"""What the dashboard's stream says: topics, and how a message looks as a server-sent event."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec


class Topic(Enum):
    """What a message is about. Each topic is one type of server-sent event, with JSON in its data."""

    RIGHTS = "rights"  # first: what this reader may ask for besides reading
    HELLO = "hello"  # second: what was before, so that a page that opens late shows the same as one that was open
    STATUS = "status"  # as GET /status of the admin API has it
    POINT = "point"  # one more point of the plots
    EVENT = "event"  # as GET /events
    DECISION = "decision"  # as GET /decisions
    TOPOLOGY = "topology"  # as GET /topology, with every pair of devices
    BYE = "bye"  # last: why the stream ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message; ``data`` holds values that JSON can carry."""

    topic: Topic
    data: Any


def encode(message: Message) -> bytes:
    """Return the message as a server-sent event. JSON has no line breaks, so one line of data is enough."""
    return b"event: %b\ndata: %b\n\n" % (message.topic.value.encode(), msgspec.json.encode(message.data))
