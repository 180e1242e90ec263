"""What of a request for an engine's own server is looked at here, where that server would end over it."""

from dataclasses import replace
from typing import Any

import pytest

from engines.fake import FAKE_CAPABILITIES
from engines.sglang.own_server import own_server
from flexpiped.api.errors import ApiError
from flexpiped.api.own_bodies import refuse_unfit

CAPABILITIES = replace(FAKE_CAPABILITIES, vocab_size=100, own_server=own_server(()))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"stop_token_ids": [5, 100], "regex": "yes|no", "min_tokens": 1}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": ["100"]}, "stop_token_ids"),
        ({"stop_token_ids": [1e2]}, "stop_token_ids"),
        ({"input_ids": [5, "1_00"]}, "input_ids"),
        ({"prompt": [5, 100]}, "prompt"),
        ({"prompt": [5, "100"]}, "prompt"),
        ({"prompt": [["100"]]}, "prompt"),
        ({"prompt": [[5], [100.0]]}, "prompt"),
        ({"query": "x", "items": [[5], ["100"]]}, "items"),
        ({"label_token_ids": [[5, 100]]}, "label_token_ids"),
    ],
)
def test_a_token_id_outside_the_vocabulary_is_refused_by_name(body: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError, match=f"{named}: token ids must be from 0 to 99") as refused:
        refuse_unfit(body, served="model", capabilities=CAPABILITIES)
    assert refused.value.param == named


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "100", "stop_token_ids": [99], "logit_bias": {"100": 1}},
        {"prompt": ["100", "nan"], "stop_token_ids": None},
        {"prompt": [[0], [99]], "stop_token_ids": ["5", 5.0]},
        {"query": "100", "items": ["100"], "label_token_ids": [5]},
        {"input": [{"type": "message", "content": "100"}]},
        {"input_ids": "none of them is a number"},
    ],
)
def test_text_and_what_the_server_checks_itself_go_on(body: dict[str, Any]) -> None:
    refuse_unfit(body, served="model", capabilities=CAPABILITIES)
