"""With which engine and layout the daemon begins: those last asked for, where they still can be, else as configured."""

from collections.abc import Mapping
from dataclasses import dataclass

from engines.errors import EngineError
from flexpiped.engine_offers import EngineOffer, EngineOffers
from flexpiped.intent import objection
from flexpiped.journal import Stored
from planner.errors import PlannerError
from planner.layout import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What to start, and why that."""

    offer: EngineOffer
    engine: str
    pipeline: Pipeline
    reason: str


def restored(
    stored: Stored, offers: EngineOffers, *, basis: Mapping[str, str], num_decoders: int
) -> tuple[Beginning | None, str]:
    """Return the beginning that the stored intent means, or None and why not. Blocks: reads what is here now.

    1. The configuration and the starts before may speak against it (``intent.objection``).
    2. Its engine must be there, 3. the model must have as many layers, 4. the layout must keep the rules.
    """
    intent = stored.intent
    if against := objection(intent, basis=basis, fruitless_starts=stored.fruitless_starts):  # 1
        return None, against
    if intent.pipeline.num_decoders != num_decoders:  # 3
        return None, f"it is for {intent.pipeline.num_decoders} decoder layers, and the model has {num_decoders}"
    try:
        offer = offers.of(intent.engine)  # 2
        broken = offer.resolver.broken_rules(intent.pipeline, current=None)  # 4
    except (EngineError, PlannerError) as error:
        return None, str(error)
    if broken:
        return None, "; ".join(broken)
    return Beginning(offer=offer, engine=intent.engine, pipeline=intent.pipeline, reason=intent.reason), ""
