"""The models that an ingress answers for: once their text is there, and until nobody uses it any more."""

import asyncio
from dataclasses import replace
from typing import Any

from engines.text.errors import TextStartFailed
from engines.text.local import LocalText, PlainTokenizer
from flexpiped.ingress.here import Here
from flexpiped.ingress.link import Link
from flexpiped.ingress.messages import Model
from tests.support.http_app import CAPABILITIES
from tests.support.tiny_tokenizer import byte_level_tokenizer

MODEL = Model(
    name="tiny",
    serial=1,
    capabilities=CAPABILITIES,
    sampling_defaults={"temperature": 0.5},
    tool_format="hermes",
    tokenizer_directory="/models/tiny",
    python="python3",
)


class FakeText(LocalText):
    """Starts when it may."""

    def __init__(self) -> None:
        super().__init__(PlainTokenizer(byte_level_tokenizer()))
        self.may_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_closed = False

    async def start(self) -> None:
        await self.may_start

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.is_closed = True


class Rig:
    def __init__(self) -> None:
        self.texts: list[FakeText] = []
        self.told: list[tuple[str, ...]] = []
        self.sent: list[Any] = []
        self.here = Here(
            Link(self.sent.append), keys=lambda: None, on_change=self.told.append, make_text=self._make_text
        )

    def _make_text(self, _model: Model) -> FakeText:
        self.texts.append(FakeText())
        return self.texts[-1]


def changed(**to: Any) -> Model:
    values = {name: getattr(MODEL, name) for name in Model.__struct_fields__}
    return Model(**(values | to))


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_model_is_taken_once_its_text_is_there() -> None:
    rig = Rig()
    rig.here.use([MODEL])
    await turns()
    assert dict(rig.here.models()) == {}
    rig.texts[0].may_start.set_result(None)
    await rig.here.settled()
    await turns()

    backend = rig.here.models()["tiny"].backend
    assert backend is not None
    assert backend.sampling_defaults == {"temperature": 0.5}
    assert rig.told == [(), ("tiny",)]
    await rig.here.close()
    assert rig.texts[0].is_closed


async def test_what_changes_of_it_is_used_with_the_same_text() -> None:
    rig = Rig()
    rig.here.use([MODEL])
    rig.texts[0].may_start.set_result(None)
    await turns()
    rig.here.use([changed(capabilities=replace(CAPABILITIES, adapters=("a",)))])

    served = rig.here.models()["tiny"]
    assert (served.adapters, len(rig.texts)) == (("a",), 1)
    await rig.here.close()


async def test_one_that_leaves_keeps_its_text_while_a_request_uses_it() -> None:
    rig = Rig()
    rig.here.use([MODEL])
    rig.texts[0].may_start.set_result(None)
    await turns()
    backend = rig.here.models()["tiny"].backend
    assert backend is not None
    with backend.uses.one():
        rig.here.use([])
        await turns()
        assert (dict(rig.here.models()), rig.texts[0].is_closed) == ({}, False)
    await turns()
    assert rig.texts[0].is_closed
    await rig.here.close()


async def test_another_one_of_its_name_has_a_text_of_its_own() -> None:
    rig = Rig()
    rig.here.use([MODEL])
    rig.texts[0].may_start.set_result(None)
    await turns()
    rig.here.use([changed(serial=2)])
    await turns()

    assert (dict(rig.here.models()), len(rig.texts), rig.texts[0].is_closed) == ({}, 2, True)
    await rig.here.close()


async def test_one_whose_text_fails_is_the_daemons_to_answer_for() -> None:
    rig = Rig()
    rig.here.use([MODEL])
    rig.texts[0].may_start.set_exception(TextStartFailed("no tokenizer"))
    await rig.here.settled()

    assert dict(rig.here.models()) == {}
    await rig.here.close()


async def test_models_that_come_and_go_while_it_closes_change_nothing() -> None:
    rig = Rig()
    rig.here.use([MODEL])
    rig.texts[0].may_start.set_result(None)
    await turns()
    closing = asyncio.create_task(rig.here.close())
    await asyncio.sleep(0)
    rig.here.use([])
    rig.here.use([changed(name="another")])
    await closing

    assert [text.is_closed for text in rig.texts] == [True]
