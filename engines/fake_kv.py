"""The KV cache of the fake engine, as far as another one needs it: the prompt it was computed from.

A request that comes with a parcel is answered as if its prompt were the one in the parcel: a wrong copy is seen.
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from engines.errors import KvTransferFailed
from engines.offers import KvParcel
from engines.protocol import GenerationRequest

FAKE_KV_FORM: Final = "a fake prompt"
_BYTES_PER_TOKEN: Final = 8


class FakeKv:
    """What one fake engine has written or may load, with knobs for what goes wrong.

    ``export_failure``, ``accept_failure``: when given, each export or each acceptance fails with this sentence.
    ``garbles``: what is written is wrong, and nobody is told.
    """

    def __init__(self) -> None:
        self.export_failure: str | None = None
        self.accept_failure: str | None = None
        self.garbles = False
        self.loaded_tokens_total = 0
        self._own: Path | None = None
        self._accepted: set[Path] = set()

    @property
    def is_empty(self) -> bool:
        """Nothing is kept for anybody."""
        return not self._accepted and (self._own is None or not any(self._own.iterdir()))

    def export(self, request: GenerationRequest, *, num_generated: int) -> KvParcel:
        """Write what was computed for a request: its prompt, on which all that it is answered depends.

        Raises: KvTransferFailed.
        """
        if self.export_failure is not None:
            raise KvTransferFailed(self.export_failure)
        if self._own is None:
            self._own = Path(tempfile.mkdtemp(prefix="flexpiped-fake-kv-"))
        directory = Path(tempfile.mkdtemp(dir=self._own))
        prompt = [token ^ self.garbles for token in request.prompt_token_ids]
        (directory / "prompt").write_text(json.dumps(prompt))
        num_tokens = len(request.prompt_token_ids) + num_generated
        return KvParcel(directory=directory, num_tokens=num_tokens, num_bytes=num_tokens * _BYTES_PER_TOKEN)

    def accept(self, parcel: KvParcel) -> None:
        """Raises: KvTransferFailed."""
        if self.accept_failure is not None:
            raise KvTransferFailed(self.accept_failure)
        if not (parcel.directory / "prompt").exists():
            raise KvTransferFailed(f"there is nothing in {parcel.directory}")
        self._accepted.add(parcel.directory)

    def as_cached(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request as its KV cache has it."""
        if request.kv is None or request.kv.directory not in self._accepted:
            return request
        self.loaded_tokens_total += request.kv.num_tokens
        return replace(request, prompt_token_ids=tuple(json.loads((request.kv.directory / "prompt").read_text())))

    def forget(self, parcel: KvParcel) -> None:
        self._accepted.discard(parcel.directory)
        if parcel.directory.parent == self._own:
            shutil.rmtree(parcel.directory, ignore_errors=True)

    def close(self) -> None:
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
            self._own = None
