"""What the daemon and an ingress process say to each other survives the way."""

import pytest

from engines.offers import OwnServer
from engines.protocol import (
    EngineCapabilities,
    FinishReason,
    GenerationRequest,
    Grammar,
    GrammarKind,
    SamplingParams,
    ScoredToken,
    TokenChunk,
)
from flexpiped.api.errors import ErrorType
from flexpiped.api.metrics import Endpoint
from flexpiped.api.outcomes import Outcome
from flexpiped.ingress.messages import (
    Admit,
    Arrived,
    AwaitDeath,
    Began,
    Board,
    Boarded,
    Chunk,
    Done,
    Down,
    Drain,
    End,
    Finished,
    FrameReader,
    Generate,
    Model,
    Now,
    Ping,
    Pong,
    Refused,
    Reserve,
    Serves,
    Tokens,
    Up,
    Waited,
    Welcome,
    pack,
    tokens_of,
    unpack_down,
    unpack_up,
)
from flexpiped.keys import ANYBODY, Client, KeyRing, Scope

SAMPLING = SamplingParams(
    max_tokens=3,
    seed=2**63 - 1,
    stop_token_ids=(7,),
    bad_words=((1, 2),),
    grammar=Grammar(kind=GrammarKind.REGEX, source="a+", parameter="guided_regex"),
    engine_params={"logit_bias": {"3": 1.0}, "bad_words": ["no"], "min_tokens": 2},
)
REQUEST = GenerationRequest(request_id="cmpl-1", prompt_token_ids=(1, 2), sampling=SAMPLING)
RICH = TokenChunk(
    token_ids=(4,),
    logprobs=(-0.5,),
    finish_reason=FinishReason.STOP,
    top_logprobs=(((4, -0.5), (5, -1.5)),),
    prompt_logprobs=(ScoredToken(token_id=2, logprob=-0.1, rank=1, top=((2, -0.1),)),),
    cached_tokens=1,
)
SERVER = OwnServer(completion_parameters=frozenset({"prompt"}), chat_parameters=frozenset({"messages"}))
CAPABILITIES = EngineCapabilities(
    name="fake",
    max_model_len=64,
    vocab_size=8,
    eos_token_ids=(0,),
    refactors_in_place=True,
    max_stages=2,
    tensor_parallel=False,
    adapters=("a",),
    own_server=SERVER,
)
MODEL = Model(
    name="tiny",
    serial=1,
    capabilities=CAPABILITIES,
    sampling_defaults={"temperature": 0.5},
    tool_format="auto",
    tokenizer_directory="/models/tiny",
    python="/usr/bin/python3",
)
ALICE = Client(name="alice", scopes=frozenset({Scope.INFER}), requests_per_minute=6.0, priority=-1)
NOW = Now(
    models=(MODEL,),
    are_named=True,
    keys=KeyRing(hashes=(b"\x00" * 32,), clients=(ALICE,)),
    tls_certificate="/etc/cert.pem",
    tls_key=None,
    log_format="json",
    log_level="info",
    reloads=2,
)
UP: list[Up] = [
    Serves(("tiny",)),
    Pong(),
    Admit(1, "tiny", 1, ALICE, 1.5),
    Admit(2, "tiny", 1, ANYBODY, None),
    Reserve(3, 1, 100),
    Generate(4, "tiny", 1, REQUEST),
    Board(5, "tiny", 0),
    AwaitDeath(6, "tiny", 1),
    End(4),
    Arrived(7, "tiny", Endpoint.CHAT, 0.25),
    Waited(7),
    Began(7),
    Finished(7, "tiny", Endpoint.CHAT, 0.5, Outcome.DONE, 2, 3, 3, 0.125),
]
DOWN: list[Down] = [
    Welcome(1, 2, ("127.0.0.1", 8100), "/run/x.http", 30.0, 1024, 60.0, 8192, 75.0, 60.0),
    NOW,
    Done(1),
    Refused(2, 429, ErrorType.OVERLOADED, "later", None, "too_many", 3),
    Boarded(5, 1, "vllm", "/run/engine.sock", "secret"),
    Tokens(4, (1, 2)),
    Chunk(4, RICH),
    Ping(),
    Drain(),
]


def bodies(data: bytes, *, cut: int) -> list[bytes]:
    reader = FrameReader()
    return [body for at in range(0, len(data), cut) for body in reader.feed(data[at : at + cut])]


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_all_that_an_ingress_says(cut: int) -> None:
    frames = pack(UP[:4]) + pack(UP[4:])

    assert [message for body in bodies(frames, cut=cut) for message in unpack_up(body)] == UP


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_all_that_the_daemon_says(cut: int) -> None:
    frames = pack(DOWN[:4]) + pack(DOWN[4:])

    assert [message for body in bodies(frames, cut=cut) for message in unpack_down(body)] == DOWN


def test_a_chunk_that_says_more_than_its_tokens_goes_whole() -> None:
    plain = TokenChunk(token_ids=(1, 2))

    assert tokens_of(4, plain) == Tokens(4, (1, 2))
    assert tokens_of(4, RICH) == Chunk(4, RICH)
    assert tokens_of(4, TokenChunk(token_ids=(1,), cached_tokens=0)).__class__ is Chunk


def test_an_error_is_the_same_at_the_other_end() -> None:
    error = Refused(2, 429, ErrorType.OVERLOADED, "later", "prompt", "too_many", 3).error

    assert (error.status, error.param, error.code) == (429, "prompt", "too_many")
    assert error.headers == {"Retry-After": "3"}
