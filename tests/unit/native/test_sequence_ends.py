"""How a request ends, by itself, by its client or by a crash, and what is told of it."""

from collections.abc import Callable

import pytest

from engines.native.batch import Output
from engines.native.details import Details
from engines.native.sequence import Sequence, SequenceState
from engines.protocol import FinishReason, ScoredToken
from tests.unit.native.fake_model import Engine, preempting, prompt_of, shape, undisturbed

# --- how a request ends ---


def test_a_stop_token_ends_a_request_and_is_reported() -> None:
    expected = undisturbed([1, 2], max_tokens=9)
    stop = expected[3]
    engine = Engine()
    sequence = engine.add([1, 2], max_tokens=9, stop=[stop])
    engine.run()
    assert engine.tokens(sequence) == expected[: expected.index(stop) + 1]
    assert engine.finish(sequence) is FinishReason.STOP


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    engine = Engine()
    sequence = engine.add([99, 2, 99], max_tokens=3, stop=[99])
    engine.run()
    assert (len(engine.tokens(sequence)), engine.finish(sequence)) == (3, FinishReason.LENGTH)


def test_a_stop_token_at_the_very_end_is_a_stop() -> None:
    expected = undisturbed([1, 2], max_tokens=1)
    engine = Engine()
    sequence = engine.add([1, 2], max_tokens=1, stop=expected)
    engine.run()
    assert engine.finish(sequence) is FinishReason.STOP


def test_max_tokens_ends_a_request() -> None:
    engine = Engine()
    sequence = engine.add([1, 2], max_tokens=5)
    engine.run()
    assert engine.tokens(sequence) == undisturbed([1, 2], max_tokens=5)
    assert engine.finish(sequence) is FinishReason.LENGTH
    assert sequence.state is SequenceState.FINISHED


def test_the_end_of_the_context_ends_a_request() -> None:
    engine = Engine(max_model_len=12)
    sequence = engine.add(prompt_of(8), max_tokens=50)
    engine.run()
    assert len(sequence.tokens) == 12
    assert engine.finish(sequence) is FinishReason.LENGTH
    engine.assert_idle()


def test_tokens_generated_elsewhere_count_and_are_not_reported_again() -> None:
    expected = undisturbed([1, 2, 3], max_tokens=7)
    engine = Engine()
    sequence = engine.add([1, 2, 3], generated=expected[:4], max_tokens=7)
    engine.run()
    assert engine.tokens(sequence) == expected[4:]
    assert sequence.num_output == 7


def test_log_probabilities_go_only_to_those_who_asked() -> None:
    engine = Engine()
    asked, not_asked = engine.add([1], max_tokens=2, logprobs=True), engine.add([1], max_tokens=2)
    engine.run()
    assert [o.logprob for o in engine.outputs[asked.key]] == [-float(t) for t in engine.tokens(asked)]
    assert [o.logprob for o in engine.outputs[not_asked.key]] == [None, None]


def test_a_step_without_log_probabilities_has_none() -> None:
    engine = Engine()
    sequence = engine.add([1], logprobs=True)
    batch = engine.dispatch()
    assert batch is not None
    assert engine.scheduler.finish_step(batch, [7], None) == [Output(sequence.key, 7, None, None, cached=0)]


# --- abort ---


def waiting(engine: Engine) -> Sequence:
    return engine.add(prompt_of(3))


def running(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(3))
    engine.step()
    return sequence


def in_flight(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(3))
    engine.dispatch()
    return sequence


def in_flight_prefill(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(30))
    engine.dispatch()
    return sequence


def crashed(engine: Engine) -> Sequence:
    sequence = running(engine)
    engine.crash()
    assert sequence.state is SequenceState.WAITING
    return sequence


def finished(engine: Engine) -> Sequence:
    sequence = engine.add(prompt_of(3), max_tokens=1)
    engine.step()
    return sequence


@pytest.mark.parametrize("reach", [waiting, running, in_flight, in_flight_prefill, crashed, finished])
def test_abort_in_every_state(reach: Callable[[Engine], Sequence]) -> None:
    engine = Engine()
    sequence = reach(engine)
    told = len(engine.tokens(sequence))
    engine.scheduler.abort(sequence.key)
    assert engine.scheduler.num_live == 0
    engine.run()
    assert len(engine.tokens(sequence)) == told  # not a token more
    assert sequence.state is SequenceState.FINISHED
    engine.assert_idle()


def test_abort_of_a_preempted_request() -> None:
    engine, older, younger = preempting()
    engine.step()
    assert younger.state is SequenceState.WAITING
    engine.scheduler.abort(younger.key)
    engine.run()
    assert engine.tokens(older) == undisturbed(prompt_of(4), max_tokens=9)
    engine.assert_idle()


def test_abort_in_flight_frees_when_the_step_ends() -> None:
    engine = Engine()
    sequence = in_flight(engine)
    other = engine.add([5], max_tokens=2)
    engine.scheduler.abort(sequence.key)
    assert engine.scheduler.kv_blocks_used == 1
    assert engine.complete() == []
    assert engine.scheduler.kv_blocks_used == 0
    engine.run()
    assert engine.tokens(other) == undisturbed([5], max_tokens=2)


def test_an_aborted_neighbour_does_not_shift_the_sampled_tokens() -> None:
    engine = Engine()
    sequences = [engine.add(prompt_of(3, first=first), max_tokens=3) for first in (1, 5, 9)]
    engine.dispatch()
    engine.scheduler.abort(sequences[1].key)
    engine.run()
    assert engine.tokens(sequences[0]) == undisturbed(prompt_of(3), max_tokens=3)
    assert engine.tokens(sequences[2]) == undisturbed(prompt_of(3, first=9), max_tokens=3)


def test_an_unknown_key_has_ended_already() -> None:
    engine = Engine()
    engine.scheduler.abort(77)
    engine.assert_idle()


def test_all_are_aborted_in_flight_and_waiting() -> None:
    engine = Engine()
    in_flight(engine)
    engine.add([5], max_tokens=2)
    engine.scheduler.abort_all()
    assert engine.complete() == []
    engine.assert_idle()


# --- crash ---


def test_after_a_crash_everything_is_computed_again_in_order_of_arrival() -> None:
    engine = Engine(budget=16, micro_batches=2)
    sequences = [engine.add(prompt_of(3, first=first), max_tokens=5) for first in (1, 11, 21)]
    engine.step()
    engine.dispatch()
    engine.crash()
    assert engine.scheduler.kv_blocks_used == 0
    assert [key for key, *_ in shape(engine.dispatch())] == [1, 2]
    engine.run()
    for sequence, first in zip(sequences, (1, 11, 21), strict=True):
        assert engine.tokens(sequence) == undisturbed(prompt_of(3, first=first), max_tokens=5)
    engine.assert_idle()


def test_one_aborted_in_flight_is_gone_after_a_crash() -> None:
    engine = Engine()
    sequence = in_flight(engine)
    engine.scheduler.abort(sequence.key)
    engine.crash()
    assert engine.dispatch() is None
    engine.assert_idle()


# --- scores of prompts ---


def test_what_is_told_of_prompts_in_one_micro_batch_is_bounded() -> None:
    engine = Engine(num_blocks=3000, budget=8192, max_model_len=4096, max_num_seqs=4)
    told = [engine.add(range(1, 40), max_tokens=1) for _ in range(3)]
    for sequence in told:
        sequence.tokens = [1 + i % 30 for i in range(1500)]
        sequence.num_prompt = len(sequence.tokens)
        sequence.scores = []
    plain = engine.add([2 + i % 30 for i in range(900)], max_tokens=1)  # begins unlike the others
    seen = 0
    while (batch := engine.dispatch()) is not None:
        assert sum(entry.count for entry in batch.entries if entry.sequence is not plain) <= 2048
        seen += sum(entry.count for entry in batch.entries)
        engine.complete()
    assert seen == 3 * 1500 + 900
    engine.assert_idle()


def test_scores_of_a_prompt_come_once_in_order_and_survive_a_crash() -> None:
    def score(token: int) -> ScoredToken:
        return ScoredToken(token_id=token, logprob=-1.0, rank=1)

    engine = Engine(budget=4)
    sequence = engine.add(range(1, 11), max_tokens=3)
    sequence.scores = []
    reported = []
    for step in range(12):
        batch = engine.scheduler.schedule()
        if batch is None:
            break
        (entry,) = batch.entries
        if step == 1:  # the step in flight is lost with the KV cache
            engine.scheduler.recompute_all()
            assert [each.token_id for each in sequence.scores or ()] == [2, 3, 4, 5]
            continue
        known = len(sequence.scores or ())
        first, end = max(entry.start, known) + 1, min(entry.start + entry.count, 9) + 1
        scores = {0: [score(sequence.tokens[i]) for i in range(first, end)]} if sequence.scores is not None else {}
        tokens = [7] if entry.samples else []
        outputs = engine.scheduler.finish_step(batch, tokens, None, Details(tops={}, scores=scores))
        reported += [[each.token_id for each in output.prompt] for output in outputs]
    assert reported == [list(range(2, 11)), [], []]
