"""What of SGLang's live objects has to be there before layers move."""

import sys
from types import SimpleNamespace

from engines.sglang.command import PLUGIN

sys.path += [str(PLUGIN)]  # as SGLang's interpreter has it

from flexpiped_sglang.attributes import OF_POOL, refusal_without


def test_what_is_missing_is_named_by_its_path() -> None:
    scheduler = SimpleNamespace(running_batch=None, grammar_manager=SimpleNamespace(queue=[]))
    paths = ("running_batch", "last_batch", "grammar_manager.grammar_queue")
    refusal = refusal_without(scheduler, paths)
    assert refusal == "this SGLang's SimpleNamespace has no last_batch, grammar_manager.grammar_queue"
    assert refusal_without(scheduler, paths[:1]) == ""


def test_a_pool_has_all_that_is_set_when_layers_come_and_go() -> None:
    assert {"k_buffer", "v_buffer", "start_layer", "model_layer_ids", "_kv_buffer_descs"} <= set(OF_POOL)
