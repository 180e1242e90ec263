"""Finds an architecture's tensors in a checkpoint and checks them against each other."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from planner.architecture import Architecture, Shape
from planner.errors import UnsupportedModel

STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names of safetensors


class TensorHeader(Protocol):
    """What a checkpoint says of a tensor before it is read."""

    @property
    def dtype(self) -> str:
        """Name as safetensors writes it, such as ``BF16``."""

    @property
    def shape(self) -> Shape: ...


class CheckpointNames:
    """The names that a checkpoint has for an architecture's tensors, saved with the base model's prefix or without.

    ``tensors`` None: there is no checkpoint, and the names are those that transformers would save.
    """

    def __init__(self, arch: Architecture, tensors: Mapping[str, TensorHeader] | None) -> None:
        self._arch = arch
        prefixed = tensors is None or any(name.startswith(arch.base_prefix) for name in tensors)
        self._prefix = arch.base_prefix if prefixed else ""
        self.embedding_table = self._prefix + arch.embedding_table
        self.head_table = arch.head_table
        known = tensors or {}
        # transformers ties two tables that are both saved only when they are equal: kept apart, both cases are right
        self.tied = arch.ties_embeddings and not (self.embedding_table in known and self.head_table in known)
        if self.tied:  # one table under either name
            table = self.head_table if self.head_table in known else self.embedding_table
            self.embedding_table = self.head_table = table
        if tensors is not None:
            self._refuse_strangers(tensors)

    def under(self, prefix: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
        """Yield names in the checkpoint and shapes of the tensors below ``prefix``."""
        return ((f"{self._prefix}{prefix}{name}", shape) for name, shape in shapes.items())

    def expected(self) -> Iterator[tuple[str, Shape]]:
        """Yield every tensor that the model needs."""
        for table in dict.fromkeys((self.embedding_table, self.head_table)):
            yield table, self._arch.table_shape
        yield from self.under("", self._arch.embedding)
        for index, decoder in enumerate(self._arch.decoders):
            yield from self.under(self._arch.decoder_prefix.format(index), decoder.tensors)
        yield from self.under("", self._arch.head)

    def _refuse_strangers(self, tensors: Mapping[str, TensorHeader]) -> None:
        """Check that the checkpoint holds what the model needs, and nothing that would be left out unnoticed."""
        expected: set[str] = set()
        for name, shape in self.expected():  # as far as they go: a config may mean any number of them
            expected.add(name)
            header = tensors.get(name)
            if header is None:
                raise UnsupportedModel(f"tensor {name} is missing from the checkpoint")
            if tuple(header.shape) != shape:
                raise UnsupportedModel(f"tensor {name} has shape {list(header.shape)}, config.json means {list(shape)}")
            if header.dtype not in STORED_DTYPES:
                stored = ", ".join(STORED_DTYPES)
                raise UnsupportedModel(f"tensor {name} is stored as {header.dtype}; supported are: {stored}")
        unknown = [name for name in tensors if name not in expected and not name.endswith(self._arch.buffers)]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise UnsupportedModel(f"tensor {unknown[0]}{more} does not belong to the model that config.json describes")
