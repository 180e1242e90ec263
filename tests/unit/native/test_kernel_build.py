"""Compiling the kernels: once, into the cache; without a compiler an error that says why."""

import subprocess
import sys
from pathlib import Path

import pytest

from engines.native.kernels.build import KernelBuildFailed, build_kernels, cache_directory


def test_a_kernel_is_built_once(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")  # the second time no compiler is called
    assert build_kernels(directory=kernel.parent) == kernel
    assert [path.name for path in kernel.parent.iterdir()] == [kernel.name]


def test_a_compiler_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such processor >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(KernelBuildFailed, match=f"^{compiler}: no such processor$"):
        build_kernels(directory=tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_compiler_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(KernelBuildFailed, match="No such file"):
        build_kernels(directory=tmp_path)


def test_no_compiler_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelBuildFailed, match="no C compiler found"):
        build_kernels(directory=tmp_path)


def test_no_place_to_write_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelBuildFailed, match="Not a directory"):
        build_kernels(directory=tmp_path / "file" / "kernels")


def test_kernels_are_kept_where_configured_else_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory("/var/kernels") == Path("/var/kernels")
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("") == tmp_path / "flexpiped" / "kernels"
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/service")  # as systemd sets it
    assert cache_directory("") == Path("/var/cache/service/flexpiped/kernels")


def test_loading_a_kernel_leaves_floating_point_alone(tmp_path: Path) -> None:
    library = build_kernels(directory=tmp_path)
    program = f"import ctypes; ctypes.CDLL({str(library)!r}); print(5e-324 * 1.0 > 0.0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
