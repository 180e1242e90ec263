"""Where a worker has the parameters of a layer from: the host's memory, if they are kept there, else the files.

A layer whose tensors lie in the files as they are computed with is mapped from there, and pinned. Another one has to be
converted: that is done once, in memory that all stages of the host map, those of later engines too.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from engines.native.layer_memory import fill, mapped
from engines.native.weights import WeightFiles, populate
from engines.parameters.client import ParameterClient


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLayer:
    """A layer's parameters by their name in the model. ``kept_as``: what the keeper knows them by; empty: it does not.

    ``in_files``: they are mapped from the files. ``descriptor``: of their memory, where they are not and another keeper
    may want it; -1: there is none.
    """

    tensors: Mapping[str, torch.Tensor]
    kept_as: str
    in_files: bool
    descriptor: int = -1

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class LayerSource:
    """One worker's. Its methods may run beside the interpreter's main thread."""

    def __init__(self, weights: WeightFiles, client: ParameterClient) -> None:
        self._weights = weights
        self._client = client

    def read(
        self, layer: str, names: Mapping[str, str], *, dtypes: Mapping[str, torch.dtype], keep: bool = True
    ) -> ReadLayer:
        """Return a layer's parameters; ``names`` has the name in the checkpoint of each, ``dtypes`` what it is to be.

        ``discard`` gives them back.

        1. Without a keeper, or not to be kept: from the files, converted where need be.
        2. As they lie in the files: mapped from there, and held.
        3. Converted before, by whichever stage: mapped.
        4. Converted now, and kept for the next one.
        """
        as_stored = self._weights.are_as_stored(names, dtypes)
        if not keep or not self._client.is_there:  # 1
            return ReadLayer(tensors=self._from_files(names, dtypes), kept_as="", in_files=as_stored)
        if as_stored:  # 2
            key = self._key("as stored", names)
            is_kept = self._client.hold(key, name=layer, ranges=self._weights.ranges(names.values()))
            return ReadLayer(tensors=self._from_files(names, dtypes), kept_as=key if is_kept else "", in_files=True)
        key = self._key(str(self._weights.dtype), names)
        descriptor = self._client.take(key)
        is_kept = descriptor is not None
        if descriptor is None:  # 4
            descriptor = fill(layer, self._weights.stored(names), dtype=self._weights.dtype)
            is_kept = self._client.keep(key, name=layer, descriptor=descriptor)
        tensors = mapped(descriptor)
        if not is_kept:
            os.close(descriptor)
            return ReadLayer(tensors=tensors, kept_as="", in_files=False)
        return ReadLayer(tensors=tensors, kept_as=key, in_files=False, descriptor=descriptor)  # 3

    def populate(self, read: ReadLayer, names: Mapping[str, str], cancelled: threading.Event) -> None:
        """Fault a layer in. Spends its time in the kernel, beside the interpreter."""
        if read.in_files:
            self._weights.populate(names.values(), cancelled)
        elif read.kept_as:
            for tensor in read.tensors.values():
                populate(tensor.data_ptr(), tensor.nbytes, cancelled)

    def discard(self, read: ReadLayer) -> None:
        """Tell the keeper that this worker has let go of a layer."""
        if read.descriptor >= 0:
            os.close(read.descriptor)
        if read.kept_as:
            self._client.left(read.kept_as)

    def keep_at(self, address: str) -> None:
        """Turn to another keeper: the one before it has ended with its daemon."""
        self._client.go_to(address)

    def offer(self, layer: str, read: ReadLayer, names: Mapping[str, str]) -> ReadLayer:
        """Have the keeper keep a layer as the one before has; return it as that is known from here on.

        What several workers have in one memory, the first of them offers.
        """
        key = read.kept_as
        if not key:
            return read
        if read.in_files:
            is_kept = self._client.hold(key, name=layer, ranges=self._weights.ranges(names.values()))
            return read if is_kept else replace(read, kept_as="")
        if (there := self._client.take(key)) is not None:
            os.close(there)
            return read
        if self._client.keep(key, name=layer, descriptor=read.descriptor):
            return read
        os.close(read.descriptor)
        return replace(read, kept_as="", descriptor=-1)

    def _from_files(self, names: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        return {full: self._weights.tensor(stored, dtype=dtypes[full]) for full, stored in names.items()}

    def _key(self, form: str, names: Mapping[str, str]) -> str:
        """Return what these parameters are known by: a file that is written anew has others."""
        what = [form, [(full, *self._weights.identity(stored)) for full, stored in sorted(names.items())]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()
