"""One replica: a supervised engine, what is known of it, and whether it takes requests."""

from dataclasses import dataclass
from enum import Enum

from engines.protocol import Engine
from flexpiped.replica_facts import ReplicaFacts
from flexpiped.supervision import SupervisorState
from flexpiped.supervisor import Supervisor


class ReplicaState(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True, kw_only=True, eq=False)
class Replica:
    """One replica, by the number that operators know it by."""

    number: int
    supervisor: Supervisor
    facts: ReplicaFacts
    state: ReplicaState = ReplicaState.STARTING

    @property
    def engine(self) -> Engine | None:
        """The engine that serves and takes requests; None while there is none."""
        is_ready = self.supervisor.supervision.state is SupervisorState.READY
        return self.supervisor.engine if is_ready and self.state is ReplicaState.SERVING else None

    @property
    def has_failed(self) -> bool:
        """Whether its engine has been given up."""
        return self.supervisor.supervision.state is SupervisorState.FAILED
