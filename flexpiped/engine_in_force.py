"""The engine that serves now, as those see it who change it: what it is, what may take its place, and how."""

from collections.abc import Callable
from dataclasses import dataclass

from engines.errors import EngineDied, RefactoringRefused
from engines.protocol import Engine
from flexpiped.engine_offers import EngineOffer, EngineOffers
from flexpiped.handover_records import TargetResolver
from flexpiped.intent import InForce
from flexpiped.kv_carrier import KvCarrier
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.replicas import Replicas
from flexpiped.scaling import Fleet
from flexpiped.settings import Settings
from planner.layout import Pipeline
from planner.replica_steps import ReplicaLimits
from planner.routing import Pace


class EngineInForce:
    """Has no engine before ``replicas`` and ``offers`` are set, each once.

    Args:
        settings: Those in force.
        reason: Why there is no engine, in words.
        against_change: Why the layout may not be changed now; empty: it may.
    """

    def __init__(
        self, *, settings: Callable[[], Settings], reason: Callable[[], str], against_change: Callable[[], str]
    ) -> None:
        self._settings = settings
        self._reason = reason
        self._against_change = against_change
        self.replicas: Replicas | None = None
        self.offers: EngineOffers | None = None
        self.coming: tuple[Pipeline, ...] = ()  # planned, and not in the hands of ``replicas`` yet

    @property
    def name(self) -> str:
        """The engine in force; before there is one, the one that is configured."""
        capabilities = None if self.replicas is None else self.replicas.capabilities
        return self._settings().engine.value if capabilities is None else capabilities.name

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline in force, None before there is one."""
        return None if self.replicas is None else self.replicas.pipeline

    def use(self, settings: Settings) -> None:
        """Use what ``settings`` say of what is live."""
        if self.replicas is not None:
            self.replicas.wait_deadline_s = settings.admission.engine_wait_s
        if self.offers is not None:
            self.offers.use(settings)

    def intended(self) -> InForce | None:
        """Return what runs and is to go on; of an engine that is started again, with what it will be."""
        if self.replicas is None:
            return None
        return InForce(engine=self.name, pipelines=self.replicas.lasting_pipelines)

    def engine(self) -> Engine:
        """Return the engine that serves.

        Raises:
            EngineDied: None does.
        """
        engine = self.known_replicas().engine
        if engine is None:
            raise self._none_serves()
        return engine

    def engine_to_change(self) -> Engine:
        """Return the engine that serves, for one who will change its layout.

        Raises:
            RefactoringRefused: Nothing may be changed now.
            EngineDied: None serves.
        """
        if against := self._against_change():
            raise RefactoringRefused(against)
        return self.engine()

    def offer(self) -> EngineOffer:
        """Return the kind of engine that is in force.

        Raises:
            EngineError: It cannot be had any more.
        """
        return self._known_offers().of(self.name)

    def other(self, name: str) -> "Other":
        """Return what makes an engine of another kind take over.

        Raises:
            EngineError: It cannot be had.
        """
        offer = self._known_offers().of(name)
        return Other(offer.resolver, lambda target: self._replica(target, offer))

    def replica(self, target: Pipeline, on: int | None = None) -> ReplicaRunner:
        """Return what makes a second instance of the same kind take over, for the replica of that number.

        Raises:
            EngineError: None serves, or no second one can be had.
        """
        return self._replica(target, self.offer(), on=on)

    def known_replicas(self) -> Replicas:
        """Return all replicas. Raises ``EngineDied``: there are none yet."""
        if self.replicas is None:
            raise self._none_serves()
        return self.replicas

    @property
    def fleet(self) -> Fleet:
        """The replicas, as those see them who want more or fewer."""
        return Fleet(
            replicas=self.known_replicas,
            factory=lambda: self.offer().factory,
            drain_deadline_s=self._settings().handover.drain_deadline_s,
        )

    def pace_of(self, pipeline: Pipeline) -> Pace:
        """Return how fast a pipeline is predicted to be; may block. Raises ``PlannerError``, ``EngineError``."""
        return self.offer().resolver.pace_of(pipeline)

    def _replica(self, target: Pipeline, offer: EngineOffer, *, on: int | None = None) -> ReplicaRunner:
        replica = self.known_replicas().main if on is None else self.fleet.replica(on)
        handover = self._settings().handover
        return ReplicaRunner(
            replica.supervisor,
            target,
            factory=offer.factory,
            carrier=KvCarrier(kv_bytes_per_token=offer.resolver.kv_bytes_per_token, preference=handover.kv),
            limits=ReplicaLimits(drain_deadline_s=handover.drain_deadline_s),
        )

    def _known_offers(self) -> EngineOffers:
        if self.offers is None:
            raise self._none_serves()
        return self.offers

    def _none_serves(self) -> EngineDied:
        return EngineDied(f"no engine serves now: {self._reason()}")


@dataclass(frozen=True, slots=True)
class Other:
    """An ``OtherEngine``."""

    resolver: TargetResolver
    replica: Callable[[Pipeline], ReplicaRunner]
