"""How fast a device reads and copies memory: what decoding and KV migration are held against."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """Bytes per second, each byte counted once. On their way from and to the host they go through pinned memory."""

    read: float
    copied_within: float
    to_host: float
    to_device: float

    @property
    def through_host(self) -> float:
        """Of a copy from worker to worker through the host whose two halves overlap."""
        return min(self.to_host, self.to_device)


def device_rates(device: torch.device, *, num_bytes: int) -> DeviceRates:
    """Measure with buffers of ``num_bytes``, the best of a few times; gives the memory back. Blocks."""
    rates = _measured(device, num_bytes)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def _measured(device: torch.device, num_bytes: int) -> DeviceRates:
    here, there = (torch.zeros(num_bytes // 4, dtype=torch.float32, device=device) for _ in range(2))
    host = torch.zeros(num_bytes // 4, dtype=torch.float32, pin_memory=device.type == "cuda")
    return DeviceRates(
        read=num_bytes / _best_s(here.sum, device),
        copied_within=num_bytes / _best_s(lambda: there.copy_(here), device),
        to_host=num_bytes / _best_s(lambda: host.copy_(here), device),
        to_device=num_bytes / _best_s(lambda: here.copy_(host), device),
    )


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(_REPEATS):
        _wait(device)
        began_s = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - began_s)
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
