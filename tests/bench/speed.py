"""The native engine's speed over HTTP against vLLM, eager and compiled, and SGLang, all on the same checkpoint.

float32, the same number of threads, one server busy at a time, in turns; prompts are random and never come again, so
that no prefix cache knows them. Every number of streams with short prompts and with long ones. Then a profile: what a
step's time goes to in the stage worker, between two steps, and in the processes that bring tokens to the client.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from tests.bench.contestants import Contestant, Opening, OverHttp, vllm_http
from tests.bench.daemon_process import BATCHED_TOKENS, DaemonProcess, daemon
from tests.bench.http_client import HttpClient, http_client
from tests.bench.program import add_engine_pythons, checkpoint, parser, qwen_checkpoint, run, setup_of, whole_numbers
from tests.bench.rounds import Rates, RoundsPlan, hold_rounds
from tests.bench.sglang_server import sglang_server
from tests.bench.speed_profile import Profile, profile_of
from tests.bench.tables import Bound, ms, say, table, verdicts, write_json

NATIVE, EAGER, COMPILED, SGLANG = "flexpiped native", "vLLM eager", "vLLM compiled", "SGLang"
_LIMIT = 1.2  # of the best of the others, at least
_WARM_STREAMS = 2


def _options() -> argparse.Namespace:
    made = parser("Compare the native engine's speed with that of vLLM and SGLang, and profile it.")
    add_engine_pythons(made)
    made.add_argument("--qwen", action="store_true", help="a model of Qwen2.5-0.5B's shape in bfloat16 instead")
    made.add_argument("--streams", type=whole_numbers, default=(1, 8, 32), help="numbers of streams")
    made.add_argument("--prompts", type=whole_numbers, default=(32, 1024), help="lengths of the prompts")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    made.add_argument("--turn-s", type=float, default=1.5, help="a turn repeats its batch until so much was measured")
    made.add_argument("--only", metavar="WORDS", default="", help="only contestants with these words in their names")
    options = made.parse_args()
    if options.short:
        options.rounds, options.turn_s, options.tokens = 1, 0.0, 16
    return options


def _others(options: argparse.Namespace, model: Path, client: HttpClient) -> dict[str, Opening]:
    """Return what opens the other engines, those left out left out."""
    openings: dict[str, Opening] = {}
    if options.vllm_python is None:
        say("vLLM is left out: --vllm-python PATH names the interpreter of its environment")
    else:
        python = options.vllm_python.absolute()  # not resolved: a virtual environment is found by its link
        for name in (EAGER, COMPILED):
            openings[name] = vllm_http(name, client, python, model, threads=options.threads, eager=name == EAGER)
    return {name: opening for name, opening in openings.items() if options.only in name}


async def _open_others(
    stack: AsyncExitStack, options: argparse.Namespace, model: Path, client: HttpClient
) -> list[Contestant]:
    opened: list[Contestant] = []
    for name, opening in _others(options, model, client).items():
        opened += await stack.enter_async_context(opening())
        say(f"{name} is up")
    if options.sglang_python is None:
        say("SGLang is left out: --sglang-python PATH names the interpreter of its environment")
    elif options.only in SGLANG:
        python = options.sglang_python.absolute()
        server = sglang_server(python, model, setup_of(options), batched_tokens=BATCHED_TOKENS)
        opened.append(OverHttp(SGLANG, client, await stack.enter_async_context(server)))
        say(f"{SGLANG} is up")
    return opened


def _plan(options: argparse.Namespace, prompt_tokens: int) -> RoundsPlan:
    return RoundsPlan(
        rounds=options.rounds,
        streams=options.streams,
        prompt_tokens=prompt_tokens,
        max_tokens=options.tokens,
        turn_s=options.turn_s,
        warm_streams=_WARM_STREAMS,
    )


def _print_rates(rates: Rates, names: list[str], prompt_tokens: int, streams: tuple[int, ...]) -> None:
    head = ["", *(f"{n} streams tok/s" for n in streams), *(f"{n} streams TTFT ms" for n in streams)]
    rows = [
        [name, *(f"{rates.median(name, n):.0f}" for n in streams), *(ms(rates.first_s(name, n)) for n in streams)]
        for name in names
    ]
    table(f"prompts of {prompt_tokens} tokens, medians of rounds", head, rows)


def _bounds(rates: Rates, others: list[str], prompt_tokens: int, streams: tuple[int, ...]) -> list[Bound]:
    bounds = []
    for count in streams:
        best = max(others, key=lambda name: rates.median(name, count))
        bounds.append(
            Bound(
                what=f"prompts of {prompt_tokens}, {count} streams: tokens/s, {NATIVE} / {best}",
                value=rates.median(NATIVE, count) / rates.median(best, count),
                limit=_LIMIT,
            )
        )
    return bounds


def _print_profiles(profiles: list[Profile]) -> None:
    parts = list(dict.fromkeys(part for profile in profiles for part in profile.parts_s))
    head = ["per step, ms", "step", *parts, "other Python", "between steps"]
    rows = [
        [
            each.what,
            ms(each.step_s),
            *(ms(each.parts_s.get(part, float("nan"))) for part in parts),
            *(ms(each.rest_s), ms(each.between_s)),
        ]
        for each in profiles
    ]
    table("where a step's time goes, engine driven directly", head, rows)
    roles = list(dict.fromkeys(role for each in profiles for role in each.cpu_s))
    costs = [[each.what, *(f"{each.cpu_s.get(role, float('nan')) * 1e6:.0f}" for role in roles)] for each in profiles]
    table("CPU time of each process for each token, over HTTP, us", ["", *roles], costs)


async def _measured(contestants: list[Contestant], options: argparse.Namespace) -> dict[int, Rates]:
    seen = {}
    for prompt_tokens in options.prompts:
        say(f"prompts of {prompt_tokens} tokens")
        seen[prompt_tokens] = await hold_rounds(contestants, _plan(options, prompt_tokens))
    return seen


async def _profiles(
    model: Path, server: DaemonProcess, client: HttpClient, options: argparse.Namespace
) -> list[Profile]:
    setup = setup_of(options)
    points = [(prompt_tokens, streams) for prompt_tokens in options.prompts for streams in options.streams]
    return await profile_of(model, setup, server, client, points, max_tokens=options.tokens)


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(qwen_checkpoint if options.qwen else checkpoint, options)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(http_client())
        server = await stack.enter_async_context(daemon(model, setup_of(options), stages=1))
        say(f"{NATIVE} is up")
        others = await _open_others(stack, options, model, client)
        seen = await _measured([OverHttp(NATIVE, client, server.url), *others], options)
        profiles = await _profiles(model, server, client, options)
    names = [contestant.name for contestant in others]
    bounds = []
    for prompt_tokens, rates in seen.items():
        _print_rates(rates, [NATIVE, *names], prompt_tokens, options.streams)
        bounds += _bounds(rates, names, prompt_tokens, options.streams) if names else []
    _print_profiles(profiles)
    verdicts(bounds)
    raw = {
        "tokens_per_s": {str(length): rates.to_wire() for length, rates in seen.items()},
        "profiles": [profile.to_wire() for profile in profiles],
    }
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
