"""Finds a model's files and reads what they say about themselves: configs and safetensors headers, never weights.

Neither torch nor transformers is needed. A hub id is downloaded once and then found in the hub's own cache.

Format: https://huggingface.co/docs/safetensors (eight bytes little-endian: length of a JSON header, then data).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from engines.errors import EngineStartFailed, UnsupportedByEngine

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own
LENGTH_BYTES = 8
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OF_THE_TOP = ["*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt"]
HUB_FILES = [*_OF_THE_TOP, "*.jinja"]  # a model may have several chat templates, the further ones in a folder
HUB_FILES_LEFT_OUT = [*(f"*/{each}" for each in _OF_THE_TOP), "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies: bytes ``start <= offset < end`` of ``file``. ``dtype`` is safetensors' name for it: BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model as its files describe it. ``generation_config`` is empty where there is none."""

    directory: Path
    config: Mapping[str, object]
    generation_config: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]  # of weights, in the order of their names


def open_checkpoint(model: str, *, revision: str | None = None, token_file: Path | None = None) -> Checkpoint:
    """Find ``model``, a directory or a hub id, and read its configs and tensor headers.

    Raises:
        UnsupportedByEngine: No such model, or files that are missing, damaged or of another format.
        EngineStartFailed: The hub could not be reached or refused the download.
    """
    return read_checkpoint(find_model(model, revision=revision, token_file=token_file))


def find_model(model: str, *, revision: str | None = None, token_file: Path | None = None) -> Path:
    """Return the directory of ``model``, which is one or the id of one on the hub. Raises as ``open_checkpoint``."""
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path.resolve()
        is_file = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no such home, too long a name, a zero byte
        raise UnsupportedByEngine(f"{model!r} is no path: {error}") from error
    if is_file:
        raise UnsupportedByEngine(f"{path} is a file; a model is a directory with {CONFIG} and {WEIGHTS}")
    if not HUB_ID.fullmatch(model):
        raise UnsupportedByEngine(f"no such directory: {path}")
    return _download(model, revision=revision, token_file=token_file)


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the configs and all tensor headers of a model directory. Raises as ``open_checkpoint``."""
    config = read_config(directory)
    generation = directory / GENERATION_CONFIG
    tensors: dict[str, TensorEntry] = {}
    names_of_files = _weight_files(directory)
    for file, names in sorted(names_of_files.items()):
        entries = read_header(file)
        missing = sorted(names - entries.keys())
        if missing:
            raise UnsupportedByEngine(f"{file.name} lacks tensor {missing[0]}, which {WEIGHTS_INDEX} says it holds")
        tensors |= entries
    return Checkpoint(
        directory=directory,
        config=config,
        generation_config=_read_json(generation) if generation.is_file() else {},
        tensors=tensors,
        files=tuple(sorted(names_of_files)),
    )


def read_config(directory: Path) -> dict[str, object]:
    """Return what a model directory says of itself, weights or not. Raises as ``open_checkpoint``."""
    if not _is_there(directory / CONFIG):
        raise UnsupportedByEngine(f"{directory} has no {CONFIG}")
    return _read_json(directory / CONFIG)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file by name, in the order of its header.

    Raises:
        UnsupportedByEngine: The file is missing, cut short, or not safetensors.
    """
    try:
        with file.open("rb") as stream:
            file_bytes = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if prefix.startswith(b"version "):
                raise UnsupportedByEngine(f"{file} is a git-lfs pointer, not the weights: run git lfs pull")
            if len(prefix) < LENGTH_BYTES or LENGTH_BYTES + length > file_bytes:
                raise UnsupportedByEngine(f"{file} ends within its header: truncated, or not safetensors")
            if length > HEADER_LIMIT_BYTES:
                raise UnsupportedByEngine(f"{file} says its header has {length} bytes: not safetensors")
            header = _parse_object(stream.read(length), where=f"header of {file}")
    except OSError as error:
        raise UnsupportedByEngine(f"cannot read {file}: {error.strerror}") from error
    header.pop("__metadata__", None)
    data_start = LENGTH_BYTES + length
    entries = {name: _entry(file, name, fields, data_start) for name, fields in header.items()}
    end = max((entry.end for entry in entries.values()), default=data_start)
    if end > file_bytes:
        raise UnsupportedByEngine(f"{file} is truncated: {end - file_bytes} of {end} bytes are missing")
    return entries


def _entry(file: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    """Check one entry of a header; a tensor's bytes must be as many as its shape and dtype mean."""
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end and all(isinstance(size, int) and size >= 0 for size in shape)
        ):
            bits = DTYPE_BITS.get(dtype)
            if bits is not None and prod(shape) * bits != (end - begin) * 8:
                raise UnsupportedByEngine(f"{file}: tensor {name} has {end - begin} bytes for {dtype} {shape}")
            return TensorEntry(
                file=file, dtype=dtype, shape=tuple(shape), start=data_start + begin, end=data_start + end
            )
        case _:
            raise UnsupportedByEngine(f"{file}: the header's entry for tensor {name} is malformed")


def _weight_files(directory: Path) -> dict[Path, set[str]]:
    """Return the weight files, each with the names that an index says it holds (none without an index)."""
    if _is_there(directory / WEIGHTS):  # transformers, too, takes this one where both are there
        return {directory / WEIGHTS: set()}
    if _is_there(directory / WEIGHTS_INDEX):
        return _shards(directory / WEIGHTS_INDEX)
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise UnsupportedByEngine(f"{directory} has {others[0]} but neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    pickled = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in directory.glob(ending))
    if pickled:
        raise UnsupportedByEngine(
            f"{directory} has {pickled[0]} but no safetensors; convert it: load it with transformers, save_pretrained()"
        )
    raise UnsupportedByEngine(f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}")


def _is_there(file: Path) -> bool:
    """Raises: UnsupportedByEngine: It is a link to nothing, as a download that was interrupted leaves them."""
    if file.is_symlink() and not file.exists():
        raise UnsupportedByEngine(f"{file} is a link to {file.readlink()}, which is not there: download it again")
    return file.is_file()


def _shards(index: Path) -> dict[Path, set[str]]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedByEngine(f"{index} has no weight_map")
    files: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UnsupportedByEngine(f"{index}: {shard!r}, named for tensor {name}, is not a file beside it")
        files.setdefault(index.parent / shard, set()).add(name)
    missing = sorted(file.name for file in files if not _is_there(file))
    if missing:
        raise UnsupportedByEngine(f"{len(missing)} of {len(files)} shards are missing in {index.parent}: {missing[0]}")
    return files


def _read_json(path: Path) -> dict[str, object]:
    try:
        return _parse_object(path.read_bytes(), where=str(path))
    except OSError as error:
        raise UnsupportedByEngine(f"cannot read {path}: {error.strerror}") from error


def _parse_object(text: bytes, *, where: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSON, UTF-8, or brackets within brackets
        raise UnsupportedByEngine(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedByEngine(f"{where} is not a JSON object")
    return value


def _download(model: str, *, revision: str | None, token_file: Path | None) -> Path:
    """Fetch what is needed of a hub model, or find it in the hub's cache. The token is read and never shown."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        token = token_file.read_text().strip() if token_file else None
    except OSError as error:
        raise EngineStartFailed(f"cannot read the hub token in {token_file}: {error.strerror}") from error
    try:
        directory = snapshot_download(
            model, revision=revision, token=token, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT_OUT
        )
    except GatedRepoError as error:
        raise UnsupportedByEngine(f"{model} is gated: accept its terms on the hub and give a token file") from error
    except RepositoryNotFoundError as error:
        raise UnsupportedByEngine(
            f"{model} is neither a directory here nor a model on the hub that this token may read"
        ) from error
    except RevisionNotFoundError as error:
        raise UnsupportedByEngine(f"{model} has no revision {revision} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise EngineStartFailed(
            f"{model} is no directory here, not in the hub's cache, and the hub cannot be reached"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise EngineStartFailed(f"cannot download {model} from the hub: {error}") from error
    return Path(directory)
