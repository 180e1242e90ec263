"""What goes wrong without a daemon, as errors of ``flexctl``: one cause has one exit code, whichever command meets it.

A file that was typed and cannot be read is usage. A model that is not there, or is none, is refused, as the daemon
refuses one. A hub that cannot be reached has failed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from engines.errors import EngineError, UnsupportedByEngine
from flexpiped.config_file import ConfigError
from flexpiped.flexctl.client import BadUsage, Failed, Refused
from flexpiped.models import NoDemoModel
from planner.errors import InvalidProfile, InvalidTrace, InvalidWorkload, PlannerError
from topology.errors import TopologyError


@contextmanager
def offline_errors() -> Iterator[None]:
    """Raise what the scope raises as ``CtlError``."""
    try:
        yield
    except (ConfigError, InvalidTrace, InvalidWorkload, TopologyError, NoDemoModel) as error:
        raise BadUsage("bad_input", str(error)) from None
    except UnsupportedByEngine as error:
        raise Refused("unsupported", str(error)) from None
    except EngineError as error:
        raise Failed("engine", str(error)) from None
    except InvalidProfile as error:
        raise Failed("profile", str(error)) from None
    except PlannerError as error:
        raise Refused("infeasible", str(error)) from None
