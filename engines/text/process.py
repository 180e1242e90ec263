"""The text process: ``python -m engines.text.process MODEL_DIRECTORY FD``, with a Unix socket inherited as FD.

It loads tokenizer and chat template through transformers (never torch), says ``Ready``, and answers until the socket
closes. It dies with the process that started it and ignores the terminal's and systemd's signals, since streams that
are being drained still need it.
"""

import functools
import inspect
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from engines.process import die_with_parent
from engines.text.bounded import Bounds
from engines.text.detokenize import Detokenizer
from engines.text.errors import TextRefused, TextStartFailed
from engines.text.pieces import PieceOf, pieces_of, window_pieces
from engines.text.session import Calls, Streams
from engines.text.tokenizer import DetokenizerFactory, detokenizers_of, window_detokenizers
from engines.text.tokenizer_files import has_words, hint_at
from engines.text.wire import About, Call, ChatOptions, FrameReader, LastWords, Ready, Reply, pack, unpack_requests

_RECEIVE_BYTES = 1 << 18
_LONGEST_WORDS = 1000  # characters of an error
_SWITCH_INTERVAL_S = 0.0005  # a chat template being rendered delays a stream's text by no more than this


class HuggingFaceTokenizer:
    """A ``TextTokenizer`` from a model directory."""

    def __init__(self, model: str) -> None:
        sys.modules["torch"] = None  # type: ignore[assignment]  # transformers then finds none: 1.7 s and 64 MB, not 3.6 s and 250 MB
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            if self._tokenizer.chat_template is None:
                self._tokenizer.chat_template = _template_of_processor(Path(model))
        except Exception as error:  # transformers raises what it likes about files that are missing or broken
            said = hint_at(Path(model)) or " ".join(_said(error).split())
            raise TextStartFailed(f"no tokenizer can be read from {model}: {said}") from error
        if not has_words(self._tokenizer):
            why = hint_at(Path(model)) or "it has special tokens alone"
            raise TextStartFailed(f"no tokenizer can be read from {model}: {why}")
        self._bounds = Bounds()
        self._own_arguments = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()
        self._detokenizers = self._detokenizer_factory()
        self.piece = self._piece_factory()

    def _detokenizer_factory(self) -> DetokenizerFactory:
        if self._tokenizer.is_fast:
            return detokenizers_of(self._tokenizer.backend_tokenizer)
        return window_detokenizers(
            lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
            is_special=frozenset(self._tokenizer.all_special_ids).__contains__,
            token_of=self._token_of,
        )

    def _piece_factory(self) -> PieceOf:
        if self._tokenizer.is_fast:
            return pieces_of(self._tokenizer.backend_tokenizer)
        return window_pieces(
            lambda ids: str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
            token_of=self._token_of,
            is_special=frozenset(self._tokenizer.all_special_ids).__contains__,
        )

    def _token_of(self, token_id: int) -> str | None:
        return self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except Exception as error:  # whatever the tokenizer raises is about this text; other requests go on
            raise TextRefused(f"the tokenizer refuses this text: {_said(error)}") from error

    @functools.cached_property
    def about(self) -> About:
        tokenizer = self._tokenizer
        added = {str(token.content): int(token_id) for token_id, token in tokenizer.added_tokens_decoder.items()}
        template = None if tokenizer.chat_template is None else _template_for_tools(tokenizer)
        return About(chat_template=template, added_tokens=added)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: ChatOptions = ChatOptions(),
    ) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise TextRefused("this model has no chat template; use /v1/completions")
        reserved = options.template_kwargs.keys() & self._own_arguments
        if reserved:
            raise TextRefused(f"chat_template_kwargs must not have {min(reserved)}: it is no value of the template's")
        try:
            text = self._bounds.run(
                lambda: self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    add_generation_prompt=options.add_generation_prompt,
                    continue_final_message=options.continue_final_message,
                    tokenize=False,
                    **options.template_kwargs,
                )
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise TextRefused(f"the model's chat template refuses these messages: {_said(error)}") from error
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        try:
            return str(
                self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
        except Exception as error:  # as in ``encode``
            raise TextRefused(f"the tokenizer refuses these tokens: {_said(error)}") from error

    def detokenizer(self, prompt_tail: tuple[int, ...]) -> Detokenizer:
        return self._detokenizers(prompt_tail)


def _said(error: Exception) -> str:
    """Return the words of an error as text that can be sent: a template may raise megabytes, or half characters."""
    return str(error)[:_LONGEST_WORDS].encode(errors="replace").decode()


def _template_of_processor(model: Path) -> str | None:
    """Return the chat template of a model that takes images, too: it may have a file that tokenizers do not read."""
    file = model / "chat_template.json"
    return str(json.loads(file.read_bytes())["chat_template"]) if file.is_file() else None


def _template_for_tools(tokenizer: Any) -> str | None:
    """Return the chat template that is rendered where there are tools: a model may have one for them alone."""
    try:
        return str(tokenizer.get_chat_template(tools=[{}]))
    except ValueError:  # several, and none of them is the default
        return None


class Process:
    """The main thread serves streams; another one encodes, which can take long but lets go of the interpreter."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._pending: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def send(self, replies: list[Reply]) -> None:
        frame = pack(replies)
        with self._sending:
            self._channel.sendall(frame)

    def serve(self, tokenizer: HuggingFaceTokenizer) -> None:
        """Answer until the other side closes the channel."""
        threading.Thread(target=self._encode, args=(Calls(tokenizer),), daemon=True, name="encode").start()
        self.send([Ready(vocab_size=tokenizer.vocab_size, about=tokenizer.about)])
        streams, reader = Streams(tokenizer), FrameReader()
        # One buffer for all reads: one of that size for each, cut to what came, leaves a heap that grows with requests.
        received = memoryview(bytearray(_RECEIVE_BYTES))
        while size := self._channel.recv_into(received):
            replies: list[Reply] = []
            for body in reader.feed(received[:size]):
                for request in unpack_requests(body):
                    if isinstance(request, Call):
                        self._pending.put(request)
                    elif (reply := streams.answer(request)) is not None:
                        replies.append(reply)
            if replies:
                self.send(replies)

    def _encode(self, calls: Calls) -> None:
        while True:
            self.send([calls.answer(self._pending.get())])

    def last_words(self, kind: type[BaseException], error: BaseException | None, where: TracebackType | None) -> None:
        """Report an error that nobody handles, then end. The traceback goes to stderr, if no files are at fault."""
        if isinstance(error, TextStartFailed):
            self.send([LastWords(reason=str(error))])
        elif not isinstance(error, BrokenPipeError | ConnectionResetError):  # else nobody is left to tell
            sys.__excepthook__(kind, error or kind(), where)
            self.send([LastWords(reason=f"{kind.__name__}: {error}")])
        os._exit(1)


def main() -> None:
    model, fd, parent_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent_pid=parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    process = Process(socket.socket(fileno=fd))
    sys.excepthook = process.last_words
    threading.excepthook = lambda args: process.last_words(args.exc_type, args.exc_value, args.exc_traceback)
    process.serve(HuggingFaceTokenizer(model))


if __name__ == "__main__":
    main()
