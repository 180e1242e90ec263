"""One worker's part in a handover: prepare, copy, switch, release.

A layout here is a list: for each layer, the pipeline rank that holds it. Ranks of equal tensor-parallel index exchange
their shares.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from flexpiped_served.failpoints import Failpoints
from flexpiped_served.kv import BlockView
from flexpiped_served.pieces import Piece, pieces_of
from flexpiped_served.staging import Notice, Receiver, Staging, bind_datagram
from flexpiped_served.weights import WeightHelper

BUFFERS = 4
_RECEIVE_BYTES = 1 << 16


class Layers(Protocol):
    """The layers of a worker, as its engine keeps them. Each KV cache of a layer has a name, the same in all layers."""

    @property
    def other_bytes(self) -> int:
        """Weights beside the layers: embedding, norm and head where this rank has them."""

    def held(self) -> list[int]:
        """Return the indexes of the layers in the forward pass."""

    def bytes_of(self, index: int) -> int:
        """Return the bytes of a layer's weights, held or not."""

    def caches_of(self, index: int) -> dict[str, torch.Tensor]:
        """Return the KV caches of a layer that is held, or was until it was taken out."""

    def new_caches(self, index: int) -> dict[str, torch.Tensor]:
        """Allocate KV caches for a layer. Nothing uses them yet."""

    def drop_caches(self, index: int) -> None:
        """Let go of the KV caches of a layer outside the forward pass."""

    def fill(self, index: int, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Give a layer outside the forward pass its weights; yields between pieces of work."""

    def empty(self, index: int) -> int:
        """Take the weights of a layer outside the forward pass away; return their bytes."""

    def put_in(self, index: int, caches: dict[str, torch.Tensor]) -> None:
        """Make a filled layer part of the forward pass, between two steps."""

    def take_out(self, index: int) -> None:
        """Take a layer out of the forward pass, between two steps. What it holds stays until it is dropped."""

    def set_range(self, first: int, end: int) -> None:
        """Say which layers the forward pass runs, after all were put in and taken out."""


class _Handover:
    """What this worker knows of the handover under way."""

    def __init__(self, number: int, layout: list[int], new_layout: list[int], stage: int) -> None:
        self.number = number
        self.new_layout = new_layout
        self.gained = [i for i, (old, new) in enumerate(zip(layout, new_layout, strict=True)) if new == stage != old]
        self.lost = [i for i, (old, new) in enumerate(zip(layout, new_layout, strict=True)) if old == stage != new]
        self.target_of = {i: new_layout[i] for i in self.lost}
        self.caches: dict[int, dict[str, torch.Tensor]] = {}  # of gained layers
        self.cancelled = False
        self.switched = False


class Moving:
    """The state of a worker's handover. ``switch`` and copies out run in the main thread, the rest beside it."""

    def __init__(
        self,
        *,
        layers: Layers,
        helper: WeightHelper,
        failpoints: Failpoints,
        directory: Path,
        rank: int,
        stage: int,
        group_size: int,
        group_rank: int,
        num_blocks: int,
        slice_bytes: int,
    ) -> None:
        self._layers = layers
        self._helper = helper
        self._failpoints = failpoints
        self._directory = directory
        self._stage = stage
        self._group_size = group_size
        self._group_rank = group_rank
        self._num_blocks = num_blocks
        self._rank = rank
        caches = layers.caches_of(layers.held()[0])  # every layer has KV caches of these forms
        self.block_bytes = sum(BlockView(cache, num_blocks).block_bytes for cache in caches.values())
        self.buffer_bytes = max(slice_bytes, self.block_bytes)
        self._staging = Staging(count=BUFFERS, size=self.buffer_bytes)
        self._answers = bind_datagram(directory / f"ack-{rank}.dgram")
        self._ack_path = str(directory / f"ack-{rank}.dgram")
        self._receiver = Receiver(directory / f"kv-{rank}.dgram", self._copy_in)
        self._handover: _Handover | None = None
        self._longest_slice_s = 0.0  # of work beside the steps, in CPU time: other work on the machine does not count

    @property
    def helper_pid(self) -> int:
        return self._helper.pid

    # --- beside the steps ---

    def prepare(self, number: int, layout: list[int], new_layout: list[int]) -> Iterator[int]:
        """Load gained layers and reserve their KV caches; yields the bytes of weights loaded so far."""
        handover = self._handover = _Handover(number, layout, new_layout, self._stage)
        self._failpoints.hit("worker.prepare")
        done_bytes = 0
        for index in handover.gained:
            tensors = self._helper.load(index)
            self._failpoints.hit("worker.load")
            for _ in self._timed(self._layers.fill(index, tensors)):
                if handover.cancelled:
                    return
            handover.caches[index] = self._layers.new_caches(index)
            done_bytes += self._layers.bytes_of(index)
            yield done_bytes
        self._failpoints.hit("worker.prepared")

    def release(self, number: int) -> dict[str, int]:
        """Free what the layout in force does not need: lost layers after the switch, gained ones before it."""
        handover = self._handover
        if handover is None or handover.number != number:
            return {"weights_bytes": 0, "kv_bytes": 0}
        self._failpoints.hit("worker.release")
        handover.cancelled = True
        weights_bytes = kv_bytes = 0
        for index in handover.lost if handover.switched else handover.gained:
            weights_bytes += self._layers.empty(index)
            self._helper.left(index)
            kv_bytes += self.block_bytes * self._num_blocks
            self._layers.drop_caches(index)
        handover.caches.clear()
        self._handover = None
        return {"weights_bytes": weights_bytes, "kv_bytes": kv_bytes}

    def settle(self, *, parameters: str) -> None:
        """Finish or roll back whatever was under way when the daemon went: what ``release`` of its number would do.

        ``parameters``: address of the next one's keeper of parameters; empty: it has none.
        """
        if self._handover is not None:
            self.release(self._handover.number)
        self._helper.keep_at(parameters)

    def status(self) -> dict[str, Any]:
        """Return what this rank holds now."""
        held = self._layers.held()
        return {
            "layers": held,
            "weights_bytes": self._layers.other_bytes + sum(self._layers.bytes_of(i) for i in held),
            "kv_mapped_bytes": self.block_bytes * self._num_blocks * len(held),
            "longest_slice_s": self._longest_slice_s,
        }

    def _timed(self, slices: Iterator[None]) -> Iterator[None]:
        began_s = time.thread_time()
        for done in slices:
            self._longest_slice_s = max(self._longest_slice_s, time.thread_time() - began_s)
            yield done
            began_s = time.thread_time()

    # --- between two steps ---

    def targets(self, number: int) -> dict[int, int]:
        """Return the destination of each layer that leaves this rank."""
        return self._of(number).target_of

    def copy_out(self, number: int, ticket: int, layers: list[int], blocks: list[int], *, reply_to: str) -> None:
        """Write one piece into buffer ``ticket % BUFFERS`` and tell the destination; ``reply_to`` gets the answer."""
        handover = self._handover
        if handover is None or handover.number != number or not layers or layers[0] not in handover.target_of:
            return
        reason = ""
        try:
            if not self._failpoints.hit("worker.copy_out"):  # a control leaves the copy out
                self._send(handover, ticket, layers, blocks, reply_to=reply_to)
                return  # the destination answers
        except (RuntimeError, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        self._answers.sendto(json.dumps([number, self._rank, ticket, reason]).encode(), reply_to)

    def commit_copy(self, number: int, blocks: list[int], deadline_s: float) -> dict[str, Any]:
        """Send the remainder of all lost layers and wait until the destinations have it."""
        handover = self._of(number)
        self._failpoints.hit("worker.commit")
        if not blocks or self._failpoints.hit("worker.commit_copy"):
            return {"bytes": 0}
        give_up_s = time.monotonic() + deadline_s
        outstanding: set[int] = set()
        sent_bytes = 0
        for ticket, (layers, piece) in enumerate(self._pieces(handover, blocks)):
            while ticket - BUFFERS in outstanding:  # its buffer is the one that is needed
                outstanding.discard(self._await_answer(number, give_up_s))
            sent_bytes += self._send(handover, ticket, layers, piece, reply_to=self._ack_path)
            outstanding.add(ticket)
        while outstanding:
            outstanding.discard(self._await_answer(number, give_up_s))
        return {"bytes": sent_bytes}

    def checksums(self, number: int, blocks: list[int]) -> dict[str, list[int]]:
        """Return checksums by layer: of those that leave from their present cache, of those that come from the new."""
        handover = self._of(number)
        ids = torch.tensor(blocks, dtype=torch.int64)
        found: dict[str, list[int]] = {}
        for index in (*handover.lost, *handover.gained):
            found[str(index)] = [
                value
                for cache in self._caches(handover, index)
                for value in BlockView(cache, self._num_blocks).checksums(ids)
            ]
        return found

    def switch(self, number: int) -> None:
        """Change the forward pass to the new layout."""
        handover = self._of(number)
        self._failpoints.hit("worker.switch")
        for index in handover.lost:
            self._layers.take_out(index)
        for index in handover.gained:
            self._layers.put_in(index, handover.caches[index])
        held = [i for i, stage in enumerate(handover.new_layout) if stage == self._stage]
        first = held[0] if held else sum(stage < self._stage for stage in handover.new_layout)
        self._layers.set_range(first, first + len(held))
        handover.switched = True

    # --- inside ---

    def _of(self, number: int) -> _Handover:
        if self._handover is None or self._handover.number != number:
            raise RuntimeError(f"handover {number} is not prepared on this rank")
        return self._handover

    def _pieces(self, handover: _Handover, blocks: list[int]) -> Iterator[Piece]:
        targets = handover.target_of
        return pieces_of(targets, blocks, block_bytes=self.block_bytes, buffer_bytes=self.buffer_bytes)

    def _caches(self, handover: _Handover, index: int) -> list[torch.Tensor]:
        if index in handover.caches:
            return list(handover.caches[index].values())
        return list(self._layers.caches_of(index).values())

    def _send(self, handover: _Handover, ticket: int, layers: list[int], blocks: list[int], *, reply_to: str) -> int:
        buffer = ticket % BUFFERS
        ids = self._staging.ids(buffer, len(blocks))
        ids.copy_(torch.tensor(blocks, dtype=torch.int64))
        total = len(layers) * len(blocks) * self.block_bytes
        data = self._staging.data(buffer, len(blocks), total)
        at = 0
        for index in layers:
            for cache in self._caches(handover, index):
                view = BlockView(cache, self._num_blocks)
                size = len(blocks) * view.block_bytes
                view.gather(ids, data[at : at + size])
                at += size
        target = handover.target_of[layers[0]] * self._group_size + self._group_rank
        notice = Notice(
            handover=handover.number,
            source=self._rank,
            ticket=ticket,
            pid=os.getpid(),
            fd=self._staging.fd,
            start=self._staging.start_of(buffer),
            layers=layers,
            num_blocks=len(blocks),
            reply_to=reply_to,
        )
        self._answers.sendto(notice.encode(), str(self._directory / f"kv-{target}.dgram"))
        return total

    def _await_answer(self, number: int, give_up_s: float) -> int:
        """Return the ticket of a piece that has been copied."""
        while True:
            self._answers.settimeout(max(0.001, give_up_s - time.monotonic()))
            try:
                handover, _, ticket, reason = json.loads(self._answers.recv(_RECEIVE_BYTES))
            except TimeoutError:
                raise RuntimeError("the remainder of the KV cache was not copied in time") from None
            finally:
                self._answers.settimeout(None)
            if handover != number:  # late, of one that was rolled back
                continue
            if reason:
                raise RuntimeError(reason)
            return int(ticket)

    # --- the receiver's thread ---

    def _copy_in(self, notice: Notice, read: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> str:
        handover = self._handover
        if handover is None or handover.number != notice.handover or handover.cancelled:
            return "rolled back"
        self._failpoints.hit("worker.copy_in")
        total = len(notice.layers) * notice.num_blocks * self.block_bytes
        ids, data = read(total)
        at = 0
        for index in notice.layers:
            for cache in handover.caches[index].values():
                view = BlockView(cache, self._num_blocks)
                size = notice.num_blocks * view.block_bytes
                view.scatter(ids, data[at : at + size])
                at += size
        return ""
