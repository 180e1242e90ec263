"""Measures copies between GPUs: ``python -m engines.native.measure_gpus JSON``. Not yet run on a GPU.

Takes and gives what ``measure_links`` does. ``CUDA_VISIBLE_DEVICES`` must name ``device_ids`` in their order, so that
the GPU with number N here is ``device_ids[N]``. A copy goes the way that torch finds: P2P where the driver allows it,
else staged by the host.
"""

import json
import sys
import time
from typing import Final

import torch

_LARGE_BYTES: Final = 256 << 20
_PASSES: Final = 5
_SMALL_COPIES: Final = 100


def main() -> None:
    request = json.loads(sys.argv[1])
    number_of = {name: number for number, name in enumerate(request["device_ids"])}
    if torch.cuda.device_count() != len(number_of):
        raise SystemExit(f"torch sees {torch.cuda.device_count()} GPUs, not {len(number_of)}")
    for a, b in request["pairs"]:
        source, target = (torch.device("cuda", number_of[name]) for name in (a, b))
        large = _seconds(source, target, size_bytes=_LARGE_BYTES, repeat=1)
        small = _seconds(source, target, size_bytes=4, repeat=_SMALL_COPIES)
        line = {"a": a, "b": b, "bandwidth_bytes_per_s": _LARGE_BYTES / large, "latency_s": small}
        print(json.dumps(line), flush=True)


def _seconds(source: torch.device, target: torch.device, *, size_bytes: int, repeat: int) -> float:
    """Return the best time of one copy over some passes, after one that sets the way up."""
    data = torch.ones(size_bytes, dtype=torch.uint8, device=source)
    room = torch.empty(size_bytes, dtype=torch.uint8, device=target)
    times: list[float] = []
    for _ in range(_PASSES + 1):
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        began_s = time.perf_counter()
        for _ in range(repeat):
            room.copy_(data, non_blocking=True)
        torch.cuda.synchronize(source)
        torch.cuda.synchronize(target)
        times.append((time.perf_counter() - began_s) / repeat)
    return min(times[1:])


if __name__ == "__main__":
    main()
