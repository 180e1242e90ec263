"""Who holds memory of this host's GPUs now: asked when a process has ended, before its devices are used again."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from topology.nvml import Handle, Nvml, Refusal, nvml_session
from topology.states import DriverStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldMemory:
    """Memory of one GPU or MIG instance that the driver keeps for a process; bytes are None where it hides them."""

    pid: int
    uuid: str
    used_bytes: int | None


def held_memory(pids: Collection[int]) -> tuple[HeldMemory, ...]:
    """Return what the driver keeps for these processes, on every GPU of this host.

    Nothing where there is no driver, and of a GPU that is lost or does not say who holds its memory: what nobody can
    say is not waited for. Takes some milliseconds, and longer where the driver has to be loaded for it; in a container
    without the host's process ids the driver's ids are not ours, and nothing is found.
    """
    if not pids:
        return ()
    with nvml_session() as session:
        if isinstance(session, DriverStatus):
            return ()
        return tuple(
            HeldMemory(pid=holder.pid, uuid=uuid, used_bytes=holder.used_bytes)
            for gpu in _gpus(session)
            if not isinstance(uuid := session.uuid(gpu), Refusal)
            and not isinstance(holders := session.holders(gpu), Refusal)
            for holder in holders
            if holder.pid in pids
        )


def _gpus(session: Nvml) -> Iterator[Handle]:
    """Yield whole GPUs, or the instances of one that is divided: both would say the same of a process."""
    count = session.count()
    for index in range(0 if isinstance(count, Refusal) else count):
        gpu = session.handle(index)
        if isinstance(gpu, Refusal):
            continue
        instances = tuple(session.mig_instances(gpu))
        yield from instances or (gpu,)
