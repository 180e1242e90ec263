"""Log events that operators may rely on: one function each, with a stable event name and stable fields."""

import logging
from collections.abc import Sequence
from typing import Final

import structlog

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("flexpiped")


def daemon_starting(*, version: str, model: str, engine: str) -> None:
    _log.info("daemon starting", version=version, model=model, engine=engine)


def daemon_ready(*, start_s: float, http: str, admin: str) -> None:
    _log.info("daemon ready", start_s=round(start_s, 3), http=http, admin=admin)


def daemon_start_failed(*, reason: str) -> None:
    _log.error("daemon start failed", reason=reason)


def daemon_draining(*, reason: str, deadline_s: float) -> None:
    _log.info("daemon draining", reason=reason, deadline_s=deadline_s)


def daemon_stopped(*, up_s: float) -> None:
    _log.info("daemon stopped", up_s=round(up_s, 3))


def background_task_failed(*, task: str, error: BaseException) -> None:
    """A bug: work that should go on as long as the daemon does has ended, with its traceback."""
    _log.error("background task failed", task=task, exc_info=error)


def engine_recovering(*, reason: str) -> None:
    _log.warning("engine died, starting it again", reason=reason)


def engine_failed(*, reason: str) -> None:
    _log.error("engine failed for good", reason=reason)


def engine_adopted(*, pid: int, stages: int, epoch: int, version: str) -> None:
    """An engine that was there before the daemon serves on. ``version``: of the flexpiped that started it."""
    _log.info("engine adopted", pid=pid, stages=stages, epoch=epoch, version=version)


def engine_not_adopted(*, pid: int, reason: str) -> None:
    """``pid`` 0: it is not known."""
    _log.warning("engine not adopted", pid=pid, reason=reason)


def engines_end_with_unit(*, missing: str) -> None:
    _log.warning("engines end with the service", missing=missing)


def engine_log(*, engine: str, level: str, process: str, message: str) -> None:
    """A line that an engine's process wrote. No event of ours: ``level`` and ``message`` are the engine's."""
    _log.log(logging.getLevelNamesMapping()[level.upper()], message, engine=engine, process=process)


def engine_compiled_again(*, ranks: Sequence[int], after_s: float, compile_s: float, load_stall_s: float) -> None:
    """After a move. Steps ran eagerly for ``after_s`` and stood still for ``load_stall_s``."""
    _log.info(
        "compiled again after a move",
        ranks=list(ranks),
        after_s=round(after_s, 3),
        compile_s=round(compile_s, 3),
        load_stall_s=round(load_stall_s, 4),
    )


def engine_stays_eager(*, ranks: Sequence[int], reason: str) -> None:
    _log.warning("stays eager after a move", ranks=list(ranks), reason=reason)


def request_failed(*, method: str, error: str, frames: Sequence[str]) -> None:
    """A mistake of ours. ``frames`` say where; what the error says may be a part of the request, so it is left out."""
    _log.error("request failed", method=method, error=error, frames=list(frames))


def client_stopped_reading(*, waiting_bytes: int) -> None:
    """Its connection was closed, and its request ended; it counts as one whose client has gone."""
    _log.info("client stopped reading, connection closed", waiting_bytes=waiting_bytes)


def text_process_died(*, reason: str) -> None:
    _log.warning("text process died, starting it again", reason=reason)


def ingress_died(*, number: int, reason: str) -> None:
    """The streams of its connections have ended; those of the others go on."""
    _log.warning("ingress process died, starting it again", ingress=number, reason=reason)


def ingress_failed(*, number: int, reason: str) -> None:
    _log.error("ingress process failed for good", ingress=number, reason=reason)


def ingress_without_text(*, model: str, reason: str) -> None:
    """An ingress process cannot make text for a model, so it has the daemon answer for it."""
    _log.error("ingress process has no text process", model=model, reason=reason)


def config_unchanged(*, file: str) -> None:
    _log.info("configuration unchanged", file=file)


def config_applied(*, file: str, keys: Sequence[str]) -> None:
    _log.info("configuration changed and applied", file=file, keys=list(keys))


def config_needs_restart(*, file: str, keys: Sequence[str]) -> None:
    _log.warning("configuration changed, restart to apply", file=file, keys=list(keys))


def config_rejected(*, file: str, problems: Sequence[str]) -> None:
    _log.error("configuration rejected, the old one stays in force", file=file, problems=list(problems))


def traces_not_sent(*, reason: str) -> None:
    """Nobody takes the traces, at least not now; requests are served as before."""
    _log.warning("traces not sent", reason=reason)


def journal_failed(*, reason: str) -> None:
    """History is incomplete from here on, and a restart may not know the last layout; requests are served as before."""
    _log.error("journal failed", reason=reason)


def start_time_not_kept(*, reason: str) -> None:
    _log.warning("start time not kept", reason=reason)


def parameters_not_kept(*, reason: str) -> None:
    """A layer's parameters will not be in the memory of the host when the next stage wants them."""
    _log.info("parameters not kept", reason=reason)


def kv_resized(*, replica: int, before: int, after: int, reason: str) -> None:
    """Others have taken or freed memory. In KV blocks."""
    _log.info("KV cache resized", replica=replica, before=before, after=after, reason=reason)


def memory_short(*, replica: int, reason: str) -> None:
    """Others have taken what it needs, and nothing can be done about it."""
    _log.warning("memory is short", replica=replica, reason=reason)


def another_number_of_stages(*, stages: int, reason: str) -> None:
    """No number is configured, and the usual one cannot be."""
    _log.info("another number of stages than usual", stages=stages, reason=reason)


def layout_restored(*, engine: str, stages: Sequence[int], reason: str) -> None:
    _log.info("last layout restored", engine=engine, stages=list(stages), reason=reason)


def layout_not_restored(*, reason: str) -> None:
    _log.warning("last layout not restored", reason=reason)


def refactoring_started(*, number: int, stages: str) -> None:
    _log.info("refactoring started", number=number, stages=stages)


def request_taken_over(*, request: str, tokens: int, route: str, reason: str) -> None:
    """``route`` is how its KV cache got to the second instance: ``copy``, or ``recompute`` there."""
    _log.debug("request taken over", request=request, tokens=tokens, route=route, reason=reason)


def request_not_taken_over(*, request: str, reason: str) -> None:
    _log.info("request not taken over", request=request, reason=reason)


def refactoring_ended(*, number: int, result: str, duration_s: float) -> None:
    _log.info("refactoring ended", number=number, result=result, duration_s=round(duration_s, 4))


def auto_decided(*, verb: str, reason: str, mode: str) -> None:
    """``mode`` is "on", or "dry-run": then nothing comes of it."""
    _log.info("decided to change", verb=verb, reason=reason, mode=mode)
