"""Every message between the processes of the engine arrives as it was sent."""

from typing import get_args

import msgspec
import pytest

from engines.native import client_messages as c
from engines.native import messages as m
from engines.native.options import NativeOptions
from engines.native.shaping import Shaping
from engines.offers import KvRange
from engines.protocol import (
    EngineCounters,
    Grammar,
    GrammarKind,
    RefactorCheck,
    RefactorProgress,
    SamplingParams,
    ScoredToken,
    StageStatus,
)
from planner.handover import HandoverPhase
from planner.layout import Pipeline, pipeline_of

SPEC = m.StageSpec(first_decoder=2, end_decoder=5, is_first=False, is_last=True, next_worker=-1)
DRAW = m.Draw(row=1, temperature=0.7, top_p=0.9, top_k=40, seed=2**63 - 1, position=12, min_p=0.1)
SHAPE = m.Shape(
    row=0,
    table_row=3,
    is_masked=True,
    is_biased=False,
    repetition=1.2,
    frequency=0.5,
    presence=-0.5,
    num_prompt=4,
    num_tokens=9,
)
SCORE = m.Score(entry=1, targets=b"\x05\0\0\0", logprobs=b"", ranks=b"", top_tokens=b"", top_logprobs=b"")
TOP = ((5, -0.5), (6, -1.5))
COMMANDS: list[m.WorkerCommand] = [
    m.RunStep(
        step_id=3,
        generation=4,
        rows=b"\x01\0\0\0",
        starts=b"\0\0\0\0",
        counts=b"\x02\0\0\0",
        tokens=b"\x05\0\0\0\x06\0\0\0",
        sampled=b"",
        draws=[DRAW],
        logprobs=True,
        shapes=[SHAPE],
        tops=[m.Top(row=0, count=5)],
        scored=[m.Scored(entry=1, skipped=2, targets=b"\x05\0\0\0", count=0)],
    ),
    m.Hidden(step_id=3, generation=4, source=1),
    m.Prepare(handover=7, spec=SPEC),
    m.Loaded(handover=7),
    m.CopyOut(handover=7, ticket=8, target=2, buffer=1, decoders=[2, 3], slots=b"\xff\0\0\0"),
    m.CopyIn(handover=7, ticket=8, source=2, buffer=1, decoders=[2, 3], slots=b"\xff\0\0\0", busy_s=0.5),
    m.Checksum(ticket=9, decoders=[0], blocks=[(4, 16), (5, 1)]),
    m.Adopt(generation=5, spec=SPEC, threads=1),
    m.Release(handover=7),
    m.MoveKv(sources=b"\xff\0\0\0", targets=b"\x01\0\0\0"),
    m.BoundKv(ticket=1, end_slot=2**20),
    m.KeepAt(address="flexpiped-parameters-1"),
    m.LoadAdapter(
        number=3, name="sql", directory="/srv/sql", config="/proc/7/fd/8", weights="/proc/7/fd/9", at_once=True
    ),
    m.AdapterRead(number=3),
    m.DropAdapter(number=3),
    m.ReadStats(ticket=1),
    m.ReadSteps(ticket=1),
    m.ArmFailpoint(name="worker.step", action="kill"),
    m.Exit(),
]
REPORTS: list[m.WorkerReport] = [
    m.StepDone(
        worker=1,
        step_id=3,
        generation=4,
        tokens=b"\x07\0\0\0",
        logprobs=b"\0\0\x80\xbf",
        tops=[m.Tops(row=0, tokens=b"\x07\0\0\0", logprobs=b"\0\0\x80\xbf")],
        scores=[SCORE],
    ),
    m.Prepared(worker=1, handover=7, weights_bytes=2**40, done=False),
    m.Failed(worker=1, handover=7, reason="no such tensor"),
    m.Copied(worker=1, handover=7, ticket=8, busy_s=0.25),
    m.Checksums(worker=1, ticket=9, values=[0, 2**32 - 1]),
    m.Released(worker=1, handover=7, weights_bytes=5, kv_bytes=6),
    m.KvBounded(worker=1, ticket=1, returned_bytes=2**40),
    m.AdapterLoaded(worker=1, number=3, refusal="no such file"),
    m.Stats(worker=1, ticket=1, weights_bytes=5, kv_mapped_bytes=6, busy_s=1.25, longest_slice_s=0.004),
    m.Steps(worker=1, ticket=1, tokens=[8], sequences=[8], context=[800], busy_s=[0.004], parts_s={"all": 0.004}),
    m.Crashed(worker=1, reason="ValueError: ü"),
]

PIPELINE: Pipeline = pipeline_of(device_ids=("cpu:0", "cpu:1"), cuts=[3], num_decoders=8)
OPTIONS = NativeOptions(model_directory="/m", device_ids=("cpu:0", "cpu:1"), device_memory_bytes=1 << 30)
SAMPLING = SamplingParams(
    max_tokens=5,
    temperature=0.5,
    seed=2**63 - 1,
    stop_token_ids=(1, 2),
    logprobs=True,
    grammar=Grammar(kind=GrammarKind.REGEX, source="a+", parameter="structured_outputs"),
)
COUNTERS = EngineCounters(
    running=1,
    waiting=2,
    kv_blocks_used=3,
    kv_blocks_capacity=4,
    kv_block_tokens=16,
    prompt_tokens_total=5,
    generated_tokens_total=6,
    preemptions_total=7,
    steps_total=8,
    worker_restarts_total=9,
    refactorings_total=10,
)
STAGE = StageStatus(
    index=0,
    device_ids=("cpu:0",),
    first_decoder=0,
    end_decoder=3,
    pids=(12,),
    weights_bytes=5,
    kv_mapped_bytes=6,
    busy=None,
)
PROGRESS = RefactorProgress(
    phase=HandoverPhase.SYNCING, message="copying", elapsed_s=0.5, kv_round=2, kv_round_bytes=(10, 2)
)
CLIENT_COMMANDS: list[c.ClientCommand] = [
    c.StartCore(options=OPTIONS, pipeline=PIPELINE, epoch=3),
    c.Submit(
        key=1,
        prompt=[5, 6],
        generated=[7],
        sampling=SAMPLING,
        shaping=Shaping(min_p=0.1, bias={5: 1.5}, allowed=(5, 6), bad_words=((1, 2),)),
    ),
    c.Abort(key=1),
    c.Refactor(call=2, target=PIPELINE),
    c.CheckRefactor(call=2, target=PIPELINE),
    c.CancelRefactor(call=2),
    c.ResizeKv(call=2, blocks=100),
    c.LoadAdapter(call=2, name="sql", directory="/srv/sql"),
    c.UnloadAdapter(call=2, name="sql"),
    c.ReadCounters(call=2),
    c.ReadStages(call=2),
    c.ReadTrace(call=2),
    c.ReadSteps(call=2),
    c.ArmCore(worker=-1, name="core.commit", action="raise"),
    c.Shutdown(),
    c.Outlive(adopt_within_s=60.0),
    c.AdoptCore(parameters="flexpiped-parameters-1"),
]
READY = c.Ready(
    max_model_len=64,
    vocab_size=50,
    eos_token_ids=(1,),
    worker_pids=(12, 13),
    attention="compiled",
    kv_range=KvRange(least_blocks=4, most_blocks=100),
    grammars=True,
)
CORE_REPORTS: list[c.CoreReport] = [
    c.Starting(message="loading"),
    READY,
    c.Adopted(ready=READY, pipeline=PIPELINE, epoch=3, options=OPTIONS, adapters={"sql": "/srv/sql"}, adapter_bytes=9),
    c.StartFailed(reason="no such model", unsupported=True),
    c.Outputs(
        keys=[1, 2],
        tokens=[5, -1],
        finishes=["", "length"],
        logprobs=[-0.5, None],
        details={1: c.Details(top=TOP, prompt=(ScoredToken(token_id=5, logprob=-0.5, rank=1, top=TOP),), cached=16)},
    ),
    c.Refused(key=1, message="no such schema", parameter="response_format", code="invalid_grammar"),
    c.Progress(call=2, progress=PROGRESS),
    c.Refactored(call=2, error="RefactoringAborted", message="cancelled"),
    c.Checked(call=2, check=RefactorCheck(feasible=False, sentences=("too big",), moves=("a",))),
    c.AdapterChanged(
        call=2, error="AdapterRefused", message="not loaded", adapters={"sql": "/srv/sql"}, adapter_bytes=7
    ),
    c.KvResized(call=2, error="RefactoringBusy", message="busy", returned_bytes=0),
    c.Cancelled(call=2, accepted=True),
    c.Counters(call=2, counters=COUNTERS),
    c.KvRangeChanged(kv_range=KvRange(least_blocks=4, most_blocks=90)),
    c.Stages(call=2, stages=(STAGE,), worker_pids=(12,), longest_slice_s=0.004),
    c.Trace(call=2, ends_s=[1.5], epochs=[0], dispatches_s=[1.25]),
    c.StageSteps(call=2, tokens=[[8]], sequences=[[8]], context=[[800]], busy_s=[[0.004]]),
    c.Fatal(reason="workers keep dying"),
]


def name_of(message: object) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", COMMANDS, ids=name_of)
def test_a_command_to_a_worker_arrives(message: m.WorkerCommand) -> None:
    assert m.decode_command(m.encode(message)) == message


@pytest.mark.parametrize("message", REPORTS, ids=name_of)
def test_a_report_of_a_worker_arrives(message: m.WorkerReport) -> None:
    assert m.decode_report(m.encode(message)) == message


@pytest.mark.parametrize("message", CLIENT_COMMANDS, ids=name_of)
def test_a_command_to_the_core_arrives(message: c.ClientCommand) -> None:
    assert c.decode_command(c.encode(message)) == message


@pytest.mark.parametrize("message", CORE_REPORTS, ids=name_of)
def test_a_report_of_the_core_arrives(message: c.CoreReport) -> None:
    assert c.decode_report(c.encode(message)) == message


def test_no_message_was_forgotten_here() -> None:
    for examples, union in (
        (COMMANDS, m.WorkerCommand),
        (REPORTS, m.WorkerReport),
        (CLIENT_COMMANDS, c.ClientCommand),
        (CORE_REPORTS, c.CoreReport),
    ):
        assert {type(example) for example in examples} == set(get_args(union))


def test_a_worker_that_waits_has_no_role() -> None:
    message = m.Adopt(generation=5, spec=None, threads=1)
    assert m.decode_command(m.encode(message)) == message


def test_a_report_is_not_a_command() -> None:
    with pytest.raises(msgspec.ValidationError):
        m.decode_command(m.encode(REPORTS[0]))


def test_the_layers_of_a_stage_in_order() -> None:
    assert SPEC.layers() == ("2", "3", "4", "head")
    whole = m.StageSpec(first_decoder=0, end_decoder=2, is_first=True, is_last=True, next_worker=-1)
    assert whole.layers() == ("embedding", "0", "1", "head")


def test_daemon_and_core_of_another_version_would_notice() -> None:
    """The digest is that of the messages, so nobody has to remember a version number."""
    assert c.protocol_digest() == c.protocol_digest()
    assert c.options_digest(OPTIONS) == c.options_digest(OPTIONS)
    assert c.options_digest(OPTIONS) != c.options_digest(msgspec.structs.replace(OPTIONS, nice=3))
