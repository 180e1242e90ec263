"""An answer as server-sent events, in as few writes to its connection as there can be."""

from aiohttp import web


class EventStream(web.StreamResponse):
    """Its head goes out with the first events, and its end with the last ones where ``write_eof`` gets them.

    Each write is a system call that wakes the client: of a short answer they are most of what it costs.
    """

    _send_headers_immediately = False  # as of aiohttp's answers that are whole: else head and first events are apart
