"""What stages and the keeper of parameters say to each other: one JSON object a packet, over a local socket.

Our plugins in vLLM and in SGLang speak it, too, with the standard library alone (``flexpiped_served.keeping``).

A descriptor travels with ``Keep``, and with ``Found`` where that says so. It is of anonymous memory (a memfd), which is
there as long as anybody has it: when the daemon ends, however it ends, nothing is left.
"""

import msgspec

MOST_BYTES = 128 << 10  # of a packet; the kernel's default takes a little more


class Take(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage wants the parameters of a layer, if they are kept; then it has them until it says ``Left``."""

    key: str


class Keep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage has made the parameters of a layer; the descriptor is of their memory. It has them until ``Left``."""

    key: str
    name: str
    of: str


class Hold(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage uses a layer as it lies in files, by (file, first byte, end): those bytes are to stay in memory."""

    key: str
    name: str
    of: str
    ranges: list[tuple[str, int, int]]


class Left(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage has let go of a layer. Not answered."""

    key: str


class Found(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to ``Take``."""

    is_here: bool


class Noted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to ``Keep`` and ``Hold``. ``is_kept`` False: the layer is the stage's own, and goes with it."""

    is_kept: bool


Question = Take | Keep | Hold | Left
Answer = Found | Noted

_encoder = msgspec.json.Encoder()
_questions = msgspec.json.Decoder(Question)
_answers = msgspec.json.Decoder(Answer)


def encode(message: Question | Answer) -> bytes:
    return _encoder.encode(message)


def decode_question(raw: bytes) -> Question:
    """Raises ``msgspec.DecodeError``."""
    question: Question = _questions.decode(raw)
    return question


def decode_answer(raw: bytes) -> Answer:
    """Raises ``msgspec.DecodeError``."""
    answer: Answer = _answers.decode(raw)
    return answer
