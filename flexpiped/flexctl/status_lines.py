"""``flexctl status``: from what the admin API says to lines for people. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from flexpiped.flexctl.rebalance_lines import is_scaling
from flexpiped.flexctl.text import PLAIN, Colour, Paint, bar, format_age, format_duration, format_latency, table
from topology.units import format_bytes, format_bytes_of, plural

_WIDTH: Final = 100
_STATE_COLOURS: Final = {"ready": Colour.GREEN, "failed": Colour.RED}
_NOT_REPORTED: Final = "-"


def status_lines(status: Mapping[str, Any], *, now_unix_s: float, paint: Paint = PLAIN) -> list[str]:
    """Return one screen: state, traffic, stages, last handover, and where model and API are."""
    lines = [_headline(status, paint)]
    if status["reason"]:
        lines.append(f"  {status['reason']}")
    if status["engine_counters"] is not None:
        lines.append(f"  {_traffic(status)}")
        lines += _prefixes(status["engine_counters"])
    lines += _load(status.get("arrivals", ()))
    lines += _replicas(status) if len(status.get("replicas", ())) > 1 else _stage_table(status)
    if status["under_way"]:
        lines.append(f"now            {status['under_way']}")
    if status["last_handover"]:
        lines.append(_handover(status["last_handover"], now_unix_s, paint))
    if status.get("auto"):
        lines += _auto(status["auto"])
    if status.get("parameter_cache"):
        lines += _parameters(status["parameter_cache"])
    lines.append(f"model          {status['model']['path']}")
    lines.append(f"API            {status['api_url']}   flexpiped {status['version']}")
    return lines


def _headline(status: Mapping[str, Any], paint: Paint) -> str:
    facts = [status["model"]["name"], status["engine"]]
    if len(status.get("replicas", ())) > 1:
        facts.append(f"{len(status['replicas'])} replicas")
    elif status["stages"]:
        facts += [f"epoch {status['epoch']}", plural(len(status["stages"]), "stage")]
    if status.get("auto"):
        facts.append(f"auto {status['auto']['mode']}")
    left, state, up = "   ".join(facts), status["state"], f", up {format_age(status['uptime_s'])}"
    space = " " * max(3, _WIDTH - len(left) - len(state) - len(up))
    return left + space + paint(state, _STATE_COLOURS.get(state, Colour.YELLOW)) + up


def _traffic(status: Mapping[str, Any]) -> str:
    counters, rate = status["engine_counters"], status["tokens_per_s"]
    parts = [
        f"{counters['running']} running",
        f"{counters['waiting']} waiting",
        "tok/s not measured yet" if rate is None else f"{rate:.0f} tok/s",
    ]
    if status["ttft"] is None and status["tpot"] is None:
        parts.append("TTFT and TPOT: no request yet")
    else:
        parts += [_percentiles("TTFT", status["ttft"]), _percentiles("TPOT", status["tpot"])]
    return "   ".join(parts)


def _prefixes(counters: Mapping[str, Any]) -> list[str]:
    """Return how much of the prompts was in the KV cache; nothing where no engine tells, or there was no prompt yet."""
    queried, hit = counters.get("prefix_queried_tokens_total"), counters.get("prefix_hit_tokens_total")
    if not queried or hit is None:
        return []
    kept = plural(counters.get("kv_blocks_cached") or 0, "KV block")
    return [f"  prefix cache   {hit / queried:.0%} hits ({hit:,} of {queried:,} tokens)   {kept} kept"]


def _load(windows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how often requests come (over the shortest window) and how unevenly over each; windows that say the same
    are named together. Nothing where nobody counts.
    """
    if not windows:
        return []
    rate = windows[0]["requests_per_s"]
    came = f"requests/s {rate}" if isinstance(rate, str) else f"{rate:.2f} requests/s"
    cvs = [f"{cv} ({_lengths(alike)})" for cv, alike in groupby(windows, key=_cv)]
    return [f"  load   {came}   CV " + "  ".join(cvs)]


def _lengths(windows: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{window['window_s']:g} s" for window in windows)


def _cv(window: Mapping[str, Any]) -> str:
    cv = window["cv"]
    return cv if isinstance(cv, str) else f"{cv:.2f}"


def _percentiles(name: str, values: Mapping[str, float] | None) -> str:
    if values is None:
        return f"{name}: no request yet"
    return f"{name} p50 {format_latency(values['p50_s'])}  p99 {format_latency(values['p99_s'])}"


def _replicas(status: Mapping[str, Any]) -> list[str]:
    """Return the stages of each replica, below a line that says how it is."""
    lines = []
    for each in status["replicas"]:
        facts = [f"replica {each['number']}", each["state"]]
        if each["stages"]:
            facts += [
                f"epoch {each['epoch']}",
                plural(len(each["stages"]), "stage"),
                plural(each["requests"], "request"),
            ]
        lines += ["  " + "   ".join(facts) + (f"   {each['reason']}" if each["reason"] else ""), *_stage_table(each)]
    return lines


def _stage_table(status: Mapping[str, Any]) -> list[str]:
    """KV blocks are global over the stages of a replica, so every stage shows the same count."""
    if not status["stages"]:
        return []
    counters = status["engine_counters"]
    used, capacity = counters["kv_blocks_used"], counters["kv_blocks_capacity"]
    digits = len(str(capacity))
    blocks = f"{bar(used, capacity)}  {used:>{digits}} / {capacity}"
    rows = [("stage", "device", "layers", "weights", "KV mapped", "PSS", "KV blocks used / capacity", "busy")]
    last = len(status["stages"]) - 1
    rows += [
        (
            str(stage["index"]),
            "+".join(stage["device_ids"]),
            layers_text(stage, is_first=stage["index"] == 0, is_last=stage["index"] == last),
            format_bytes(stage["weights_bytes"]),
            _kv_mapped(stage["kv_mapped_bytes"], counters.get("kv_device_bytes")),
            _pss(stage["workers"]),
            blocks,
            _NOT_REPORTED if stage["busy"] is None else f"{stage['busy'] * 100:.0f} %",
        )
        for stage in status["stages"]
    ]
    if any(stage.get("runs") for stage in status["stages"]):
        runs = ("runs", *(stage.get("runs") or _NOT_REPORTED for stage in status["stages"]))
        return table([(*row, what) for row, what in zip(rows, runs, strict=True)], gap="  ")
    return table(rows, gap="  ")


def layers_text(stage: Mapping[str, Any], *, is_first: bool, is_last: bool) -> str:
    """Return the layers of a stage in words: ``embedding, 0-3``."""
    first, last = stage["first_decoder"], stage["end_decoder"] - 1
    parts = ["embedding"] if is_first else []
    if last >= first:
        parts.append(str(first) if first == last else f"{first}-{last}")
    return ", ".join([*parts, "head"] if is_last else parts) or "none"


def _kv_mapped(mapped_bytes: int, device_bytes: int | None) -> str:
    """Return what is mapped of a stage's KV cache, and of how much where each device has a budget for it."""
    return format_bytes(mapped_bytes) if device_bytes is None else format_bytes_of(mapped_bytes, device_bytes)


def _pss(workers: list[Mapping[str, Any]]) -> str:
    known = [worker["pss_bytes"] for worker in workers if worker["pss_bytes"] is not None]
    return format_bytes(sum(known)) if known else _NOT_REPORTED


def _auto(auto: Mapping[str, Any]) -> list[str]:
    """Return the last decision; none where automatic control is off."""
    if auto["mode"] == "off":
        return []
    decision, mode = auto["decision"], "" if auto["mode"] == "on" else f"   (auto {auto['mode']})"
    return [f"decision       {decision['message'] if decision else 'none yet'}{mode}"]


def _parameters(cache: Mapping[str, Any]) -> list[str]:
    """Return what stays in host memory of layers' parameters; nothing where nothing is to."""
    if not cache["budget_bytes"]:
        return []
    held = f"{format_bytes(cache['held_bytes'])} of {format_bytes(cache['budget_bytes'])} in host memory"
    layers = f"{plural(cache['layers'], 'layer')}, {cache['idle_layers']} of them without a stage"
    asked = cache["hits_total"] + cache["misses_total"]
    found = f"found {cache['hits_total']} of {asked} times"
    return [f"parameters     {held}: {layers}; {found}"]


def _handover(record: Mapping[str, Any], now_unix_s: float, paint: Paint) -> str:
    age = format_age(now_unix_s - record["finished_unix_s"])
    head = f"handover #{record['number']}".ljust(15)
    if record.get("engine_after"):
        head += f"{record['engine_before']} -> {record['engine_after']}, "
    if is_scaling(record):
        head += f"{record['what']}, {age} ago: "
    else:
        head += f"{record['stages_before']} -> {record['stages_after']} stages, {age} ago: "
    if record["result"] != "done":
        return head + paint(record["result"], Colour.RED) + f", {record['message']}"
    return head + ", ".join(handover_facts(record))


def handover_facts(record: Mapping[str, Any]) -> list[str]:
    """Return what a finished handover moved and what it cost, as far as the engine reported it."""
    if is_scaling(record):
        return [record["message"]]
    facts = [plural(record["layers_moved"], "layer")]
    progress = record["progress"]
    if record.get("way") == "replica":
        return ["by replica", record["message"].removeprefix("the second instance serves, ")]
    if progress is not None:
        facts.append(f"{format_bytes(progress['weights_bytes'])} weights")
        rounds = len(progress["kv_round_bytes"])
        facts.append(f"{format_bytes(progress['kv_bytes'])} KV in {plural(rounds, 'round')}")
        if progress["commit_pause_s"] is not None:
            facts.append(f"commit pause {format_duration(progress['commit_pause_s'])}")
        facts.append(f"{plural(progress['requests_live'], 'request')} went on")
    return facts
