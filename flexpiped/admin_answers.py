"""Answers of the admin API as JSON: what was asked for, or an error."""

from http import HTTPStatus

import msgspec
from aiohttp import web


def json_answer(value: object, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    """Return ``value`` as the whole answer."""
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def error_answer(code: str, message: str, status: HTTPStatus) -> web.Response:
    """Return an error that programs know by ``code``."""
    return json_answer({"error": {"code": code, "message": message}}, status)
