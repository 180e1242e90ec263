"""Finding and reading a model's files: what is found, and each way in which files can be wrong."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from engines.checkpoint import (
    HUB_FILES,
    HUB_FILES_LEFT_OUT,
    TensorEntry,
    find_model,
    open_checkpoint,
    read_checkpoint,
    read_header,
)
from engines.errors import EngineStartFailed, UnsupportedByEngine
from planner.model_graph import build_model_graph
from tests.support.graphs import SMALL_GPT2, graph_of, headers

CONFIG = {"model_type": "llama", "num_hidden_layers": 1}


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], *, metadata: bool = True) -> bytes:
    """Return the bytes of a safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if metadata else {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


A = {"a": ("F32", [2, 3], bytes(range(24)))}
B = {"b": ("BF16", [2], b"\x01\x02\x03\x04"), "c": ("U8", [], b"\x07")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a config and one file of weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(safetensors({**A, **B}))
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A directory whose weights lie in two shards."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "one.safetensors").write_bytes(safetensors(A))
    (tmp_path / "two.safetensors").write_bytes(safetensors(B, metadata=False))
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_one_file(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 2}')
    checkpoint = open_checkpoint(str(model))
    assert checkpoint.directory == model
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert checkpoint.files == (model / "model.safetensors",)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    entry = checkpoint.tensors["b"]
    assert (entry.dtype, entry.shape, entry.size_bytes) == ("BF16", (2,), 4)
    assert checkpoint.tensors["c"].shape == ()


@pytest.mark.parametrize("directory", ["model", "sharded"])
def test_offsets_are_those_of_the_file(directory: str, request: pytest.FixtureRequest) -> None:
    checkpoint = read_checkpoint(request.getfixturevalue(directory))

    def content(entry: TensorEntry) -> bytes:
        return entry.file.read_bytes()[entry.start : entry.end]

    assert {name: content(entry) for name, entry in checkpoint.tensors.items()} == {
        name: content for name, (_, _, content) in {**A, **B}.items()
    }


def test_shards(sharded: Path) -> None:
    checkpoint = read_checkpoint(sharded)
    assert checkpoint.files == (sharded / "one.safetensors", sharded / "two.safetensors")
    assert checkpoint.generation_config == {}
    assert checkpoint.tensors["c"].file.name == "two.safetensors"


def test_a_checkpoint_makes_a_model_graph(tmp_path: Path) -> None:
    shapes = {name: header.shape for name, header in headers(SMALL_GPT2).items()}
    contents = {name: ("F32", list(shape), bytes(4 * prod(shape))) for name, shape in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(SMALL_GPT2))
    (tmp_path / "model.safetensors").write_bytes(safetensors(contents))
    checkpoint = read_checkpoint(tmp_path)
    assert build_model_graph(checkpoint.config, checkpoint.tensors) == graph_of(SMALL_GPT2)


def test_what_is_downloaded_of_a_hub_model() -> None:
    wanted = {"config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"}
    wanted |= {"additional_chat_templates/tool_use.jinja"}
    others = {"consolidated.safetensors", "original/params.json", "original/consolidated.00.pth", "README.md"}
    others |= {"pytorch_model.bin", "onnx/config.json", "metal/model.safetensors", "original/tokenizer.model"}
    found = filter_repo_objects(sorted(wanted | others), allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT_OUT)
    assert set(found) == wanted


def test_a_snapshot_of_the_hub_cache_is_a_model(model: Path, tmp_path: Path) -> None:
    """Its files are links to blobs, which have no names."""
    snapshot, blobs = tmp_path / "models--org--é m" / "snapshots" / "1f2e", tmp_path / "models--org--é m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", WEIGHTS):
        (model / name).rename(blobs / f"{len(name):040x}")
        (snapshot / name).symlink_to(f"../../blobs/{len(name):040x}")
    assert list(read_checkpoint(find_model(str(snapshot))).tensors) == ["a", "b", "c"]


# ---- what can be wrong


def drop(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda directory: (directory / old).rename(directory / new)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def link_to_nothing(name: str) -> Callable[[Path], object]:
    """As the hub's cache has it where a download was interrupted, or blobs were removed."""

    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to("../../blobs/1f2e")

    return damage


WEIGHTS = "model.safetensors"
WHOLE = safetensors({**A, **B})


def with_entry(entry: object) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("config.json"), r"has no config.json"),
        (write("config.json", b"{"), r"config.json is not valid JSON: "),
        (write("config.json", b"[1]"), r"config.json is not a JSON object"),
        (write("config.json", b"[" * 200_000), r"config.json is not valid JSON: maximum recursion depth"),
        (write("generation_config.json", b"\xff"), r"generation_config.json is not valid JSON"),
        (drop(WEIGHTS), r"has neither model.safetensors nor model.safetensors.index.json"),
        (rename(WEIGHTS, "pytorch_model.bin"), r"has pytorch_model.bin but no safetensors; convert it"),
        (rename(WEIGHTS, "model.safetensors.incomplete"), r"has neither model.safetensors nor"),
        (link_to_nothing(WEIGHTS), r"model.safetensors is a link to ../../blobs/1f2e, which is not there"),
        (link_to_nothing("config.json"), r"config.json is a link to ../../blobs/1f2e, which is not there"),
        (rename(WEIGHTS, "weights.safetensors"), r"has weights.safetensors but neither model.safetensors nor"),
        (cut(WEIGHTS, 0), r"model.safetensors ends within its header"),
        (cut(WEIGHTS, 5), r"model.safetensors ends within its header"),
        (cut(WEIGHTS, 20), r"model.safetensors ends within its header: truncated"),
        (cut(WEIGHTS, len(WHOLE) - 3), rf"truncated: 3 of {len(WHOLE)} bytes are missing"),
        (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), r"git-lfs pointer, not the weights"),
        (write(WEIGHTS, (3).to_bytes(8, "little") + b"{x}"), r"header of .*model.safetensors is not valid JSON"),
        (write(WEIGHTS, with_entry(3)), r"entry for tensor a is malformed"),
        (write(WEIGHTS, with_entry({"dtype": "F32", "shape": [6]})), r"entry for tensor a is malformed"),
        (
            write(WEIGHTS, with_entry({"dtype": "F32", "shape": [6], "data_offsets": [24, 0]})),
            r"entry for tensor a is malformed",
        ),
        (
            write(WEIGHTS, with_entry({"dtype": "F32", "shape": [5], "data_offsets": [0, 24]})),
            r"tensor a has 24 bytes for F32 \[5\]",
        ),
    ],
)
def test_damage_is_named(model: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(model)
    with pytest.raises(UnsupportedByEngine, match=message):
        read_checkpoint(model)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("two.safetensors"), r"1 of 2 shards are missing in .*: two.safetensors"),
        (link_to_nothing("two.safetensors"), r"two.safetensors is a link to ../../blobs/1f2e, which is not there"),
        (link_to_nothing(INDEX), r"index.json is a link to ../../blobs/1f2e, which is not there"),
        (write(INDEX, b"{}"), r"index.json has no weight_map"),
        (write(INDEX, b'{"weight_map": {"a": "../one.safetensors"}}'), r"is not a file beside it"),
        (write("two.safetensors", safetensors(A)), r"two.safetensors lacks tensor b, which model.safetensors.index"),
    ],
)
def test_damage_of_shards_is_named(sharded: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(sharded)
    with pytest.raises(UnsupportedByEngine, match=message):
        read_checkpoint(sharded)


def test_a_header_that_claims_too_much_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as stream:
        stream.write((200_000_000).to_bytes(8, "little"))
        stream.truncate(300_000_000)  # sparse
    with pytest.raises(UnsupportedByEngine, match="says its header has 200000000 bytes"):
        read_header(file)


def test_what_is_neither_a_directory_nor_a_hub_id(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.touch()
    with pytest.raises(UnsupportedByEngine, match=r"config.json is a file; a model is a directory"):
        find_model(str(file))
    for no_path in ("~nobody-of-this-name/model", 300 * "x"):
        with pytest.raises(UnsupportedByEngine, match=r"is no path: "):
            find_model(no_path)
    with pytest.raises(UnsupportedByEngine, match=r"no such directory: /no/such/model"):
        find_model("/no/such/model")
    with pytest.raises(UnsupportedByEngine, match=r"no such directory: ../nowhere/model"):
        find_model("../nowhere/model")
    with pytest.raises(EngineStartFailed, match=r"cannot read the hub token in .*absent: No such file"):
        find_model("org/model", token_file=tmp_path / "absent")
