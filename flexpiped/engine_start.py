"""Starts the engine: with the layout last asked for, where that can be restored, else as configured."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, nullcontext

from engines.errors import EngineError
from engines.parameters.keeper import ParameterKeeper
from flexpiped import log_events
from flexpiped.adapter_set import AdapterSet
from flexpiped.device_sharing import Held
from flexpiped.engine_factory import Model, engine_purpose
from flexpiped.engine_in_force import EngineInForce
from flexpiped.engine_offers import EngineOffers
from flexpiped.events import EventKind, EventLog
from flexpiped.flight import Flights
from flexpiped.handover_records import layouts_in_words, pipeline_to_wire
from flexpiped.intent import Intent, IntentKeeper, basis_of, objection
from flexpiped.journal import Journal, JournalError
from flexpiped.refactoring import Refactorings
from flexpiped.replica_facts import ReplicaFacts
from flexpiped.replicas import Replicas
from flexpiped.restore import Beginning, restored
from flexpiped.settings import Settings
from flexpiped.start_times import StartMeter
from flexpiped.supervision import Supervision
from flexpiped.supervisor import EngineFactory, Supervisor
from flexpiped.survivors import Survivors, chosen, found_in_words, was_there_before
from planner.layout import Pipeline


class EngineStart:
    """One start. What it finds and makes goes into ``in_force``, and ends with the scope that ``run`` is given.

    Args:
        settings: Those in force; a reload may come meanwhile.
        on_change: Told how each replica fares from here on.
        on_progress: Told what the start is doing.
        on_plan: Told how many seconds each plan took, in the thread that planned.
        held: What other models hold of the devices.
        planning: Held while it plans: models that share devices plan one after the other.
        survivors: Engines that were there before the daemon.
        why_closed: Asked when the engines are ended.
        parameters: Keeps some in the memory of the host.
        adapters: The LoRA adapters that engines are to serve.
    """

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        source: str,
        in_force: EngineInForce,
        journal: Journal,
        intents: IntentKeeper,
        events: EventLog,
        refactorings: Refactorings,
        on_change: Callable[[int, Supervision], None],
        on_progress: Callable[[str], None],
        on_plan: Callable[[float], None],
        held: Callable[[], Held],
        planning: asyncio.Lock,
        survivors: Survivors,
        why_closed: Callable[[], str],
        parameters: ParameterKeeper | None = None,
        adapters: AdapterSet,
    ) -> None:
        self._adapters = adapters
        self._parameters = parameters
        self._on_plan = on_plan
        self._held = held
        self._planning = planning
        self._survivors = survivors
        self._why_closed = why_closed
        self._settings = settings
        self._source = source
        self._in_force = in_force
        self._journal = journal
        self._intents = intents
        self._events = events
        self._refactorings = refactorings
        self._on_change = on_change
        self._on_progress = on_progress
        self.further: tuple[Pipeline, ...] = ()  # replicas that are to come back beside the first one

    async def run(self, stack: AsyncExitStack, model: Model) -> Replicas:
        """Return when the engine serves.

        Raises:
            EngineError, PlannerError
        """
        self._on_progress("planning the layout")
        offers = await asyncio.to_thread(
            EngineOffers,
            self._settings(),
            source=self._source,
            model=model,
            on_news=lambda news: self._events.publish(EventKind.ENGINE, news),
            on_plan=self._on_plan,
            held=self._held,
            adapter_bytes=lambda: self._adapters.device_bytes,
            survivors=self._survivors,
            parameters=self._parameters,
        )
        self._in_force.offers = offers
        offers.use(self._settings())  # a reload may have come while they were made
        stack.callback(self._survivors.let_go)
        if (adopted := await self._adopt(stack, offers, model)) is not None:
            return adopted
        if (restored := await self._restore(stack, offers, model)) is not None:
            return restored
        return await self._begin_as_configured(stack, offers)

    async def _restore(self, stack: AsyncExitStack, offers: EngineOffers, model: Model) -> Replicas | None:
        """Begin with the layout of the last run; None: there is none, or the engine does not start with it."""
        async with self._planning:
            last = await self._last_layout(offers, num_decoders=model.graph.num_decoders)
            self._in_force.coming = () if last is None else (last.pipeline, *last.further)
        if last is None:
            return None
        try:
            replicas = await self._supervise(stack, last)
        except EngineError as error:
            await asyncio.to_thread(self._journal.forget_intent)
            self._not_restored(f"the engine did not start with it: {error}")
            return None
        self.further = last.further
        return replicas

    async def _begin_as_configured(self, stack: AsyncExitStack, offers: EngineOffers) -> Replicas:
        settings = self._settings()
        configured = offers.of(settings.engine.value)
        async with self._planning:
            pipeline, why = await asyncio.to_thread(configured.resolver.begin, settings.stages)
            self._in_force.coming = (pipeline,)
        if why:
            log_events.another_number_of_stages(stages=pipeline.granularity, reason=why)
            self._events.publish(EventKind.DAEMON, f"{layouts_in_words([pipeline.granularity])} at start: {why}")
        return await self._supervise(
            stack,
            Beginning(offer=configured, engine=settings.engine.value, pipeline=pipeline, reason="as configured"),
        )

    async def _adopt(self, stack: AsyncExitStack, offers: EngineOffers, model: Model) -> Replicas | None:
        """Go on with the engines that were there before the daemon, in their layouts; None: there are none."""
        settings = self._settings()
        does_survive = settings.engines.survive_restart
        wanted = await asyncio.to_thread(engine_purpose, settings, model) if does_survive else None
        async with self._planning:
            found = await self._survivors.find(wanted)
            if not found:
                return None
            intent = await self._intent_that_stands()
            main, *further = self._in_force.coming = chosen(found, found[:1] if intent is None else intent.pipelines)
            await self._survivors.end_others((main, *further))
        self._intents.intent = intent
        engine = settings.engine.value
        try:
            replicas = await self._supervise(
                stack,
                Beginning(offer=offers.of(engine), engine=engine, pipeline=main, reason="adopted", further=(*further,)),
            )
        except EngineError as error:
            await self._survivors.end_others()
            self._not_restored(f"an adopted engine does not serve: {error}")
            return None
        self.further = (*further,)
        pipelines = [pipeline_to_wire(each) for each in (main, *further)]
        said = found_in_words((main, *further), None if intent is None else intent.pipelines)
        self._events.publish(EventKind.DAEMON, said, state="adopted", engine=engine, pipelines=pipelines)
        return replicas

    async def _intent_that_stands(self) -> Intent | None:
        try:
            stored = None if self._journal.failure else await asyncio.to_thread(self._journal.stored)
        except JournalError:
            return None  # the journal has told
        if stored is None or objection(stored.intent, basis=basis_of(self._settings()), fruitless_starts=0):
            return None
        return stored.intent

    async def _last_layout(self, offers: EngineOffers, *, num_decoders: int) -> Beginning | None:
        """Return what was last asked for, None where there is nothing or it cannot be; the reason is told."""
        if not self._settings().journal.restore or self._journal.failure:
            return None
        try:
            stored = await asyncio.to_thread(self._journal.stored)
        except JournalError as error:
            self._not_restored(str(error))
            return None
        if stored is None:
            return None
        beginning, against = await asyncio.to_thread(
            restored, stored, offers, basis=basis_of(self._settings()), num_decoders=num_decoders
        )
        if beginning is None:
            await asyncio.to_thread(self._journal.forget_intent)
            self._not_restored(against)
            return None
        self._intents.intent = stored.intent
        await asyncio.to_thread(self._journal.begin_start)
        stages = [each.granularity for each in (beginning.pipeline, *beginning.further)]
        what = layouts_in_words(stages)
        log_events.layout_restored(engine=beginning.engine, stages=stages, reason=beginning.reason)
        self._events.publish(EventKind.DAEMON, f"last layout restored: {what}, {beginning.reason}")
        for why in beginning.left_out:
            self._tell_left_out(why)
        return beginning

    def _tell_left_out(self, why: str) -> None:
        log_events.layout_not_restored(reason=why)
        self._events.publish(EventKind.DAEMON, f"last layout not restored: {why}")

    def _not_restored(self, reason: str) -> None:
        self._intents.intent = None
        self._tell_left_out(reason)

    async def _supervise(self, stack: AsyncExitStack, beginning: Beginning) -> Replicas:
        """Start the first replica, to be started again whenever it dies.

        Raises:
            EngineError: It did not start.
        """
        replicas = Replicas(
            make=self._supervisor,
            facts=lambda: ReplicaFacts(self._in_force.pace_of),
            wait_deadline_s=self._settings().admission.engine_wait_s,
            on_change=self._on_change,
            leaving=lambda: self._adapters.leaving,
        )
        stack.push_async_callback(lambda: replicas.close(self._why_closed()))
        stack.push_async_callback(self._adapters.close)
        stack.callback(self._survivors.leave)  # after what is under way has been rolled back
        stack.push_async_callback(self._refactorings.close)
        self._in_force.replicas = replicas
        self._in_force.coming = beginning.further  # the first one is among the replicas from here on
        self._on_progress("starting the engine")
        try:
            await replicas.add(beginning.pipeline, factory=beginning.offer.factory, on_progress=self._on_progress)
        except BaseException:
            self._in_force.replicas = None
            raise
        return replicas

    def _supervisor(
        self,
        *,
        factory: EngineFactory,
        pipeline: Pipeline,
        flights: Flights,
        on_change: Callable[[Supervision], None],
        on_progress: Callable[[str], None],
    ) -> Supervisor:
        """A ``MakeSupervisor``."""
        measured = StartMeter(
            starts=lambda name: self._offers().of(name).starts, origins=lambda: self._offers().origins()
        )
        return Supervisor(
            factory=factory,
            pipeline=pipeline,
            wait_deadline_s=self._settings().admission.engine_wait_s,
            on_change=on_change,
            on_progress=on_progress,
            flights=flights,
            meter=lambda engine: nullcontext(lambda: None) if was_there_before(engine) else measured(engine),
            bring_into_line=self._adapters.bring_into_line,
        )

    def _offers(self) -> EngineOffers:
        assert self._in_force.offers is not None, "set before any engine is made"
        return self._in_force.offers
