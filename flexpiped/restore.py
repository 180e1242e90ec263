"""With which engine and replicas the daemon begins: as last asked for, where they still can be, else as configured."""

from collections.abc import Mapping
from dataclasses import dataclass

from engines.errors import EngineError
from flexpiped.engine_offers import EngineOffer, EngineOffers
from flexpiped.handover_records import TargetResolver
from flexpiped.intent import objection
from flexpiped.journal import Stored
from planner.errors import PlannerError
from planner.layout import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What to start, and why that. ``further``: replicas that come once the first one, of ``pipeline``, serves.

    ``left_out`` says of replicas why they do not come back.
    """

    offer: EngineOffer
    engine: str
    pipeline: Pipeline
    reason: str
    further: tuple[Pipeline, ...] = ()
    left_out: tuple[str, ...] = ()


def restored(
    stored: Stored, offers: EngineOffers, *, basis: Mapping[str, str], num_decoders: int
) -> tuple[Beginning | None, str]:
    """Return the beginning that the stored intent means, or None and why not. Blocks: reads what is here now.

    1. The configuration and the starts before may speak against it (``intent.objection``).
    2. Its engine must be there, 3. the model must have as many layers, 4. the layout must keep the rules.
    Of the further replicas those come back for which 3 and 4 hold, and that have their devices for themselves.
    """
    intent = stored.intent
    if against := objection(intent, basis=basis, fruitless_starts=stored.fruitless_starts):  # 1
        return None, against
    try:
        offer = offers.of(intent.engine)  # 2
    except (EngineError, PlannerError) as error:
        return None, str(error)
    if against := _against(intent.pipeline, offer.resolver, num_decoders):  # 3, 4
        return None, against
    further, left_out = _further(intent.pipelines, offer.resolver, num_decoders)
    return Beginning(
        offer=offer,
        engine=intent.engine,
        pipeline=intent.pipeline,
        reason=intent.reason,
        further=further,
        left_out=left_out,
    ), ""


def _against(pipeline: Pipeline, resolver: TargetResolver, num_decoders: int) -> str:
    if pipeline.num_decoders != num_decoders:
        return f"it is for {pipeline.num_decoders} decoder layers, and the model has {num_decoders}"
    try:
        return "; ".join(resolver.broken_rules(pipeline, current=None))
    except (EngineError, PlannerError) as error:
        return str(error)


def _further(
    pipelines: tuple[Pipeline, ...], resolver: TargetResolver, num_decoders: int
) -> tuple[tuple[Pipeline, ...], tuple[str, ...]]:
    """Return which replicas come back besides the first, and of the others why they do not."""
    back: list[Pipeline] = []
    left_out: list[str] = []
    taken = set(pipelines[0].device_ids)
    for pipeline in pipelines[1:]:
        held = ", ".join(sorted(taken & set(pipeline.device_ids)))
        against = f"{held} taken by another replica" if held else _against(pipeline, resolver, num_decoders)
        if against:
            left_out.append(f"replica on {', '.join(pipeline.device_ids)}: {against}")
            continue
        back.append(pipeline)
        taken |= set(pipeline.device_ids)
    return tuple(back), tuple(left_out)
