"""Errors of the planner.

PlannerError
+-- InvalidLayout      a layout that no engine could run
+-- UnsupportedModel   a model that cannot be read or planned
+-- InvalidWorkload    a workload or target that cannot be; the message names the key
+-- InvalidTrace       a trace of requests that cannot be read; the message has the line
+-- InvalidProfile     a stored profile that cannot be read, or that does not cover what is asked of it
+-- NoFeasiblePlan     proven: nothing fits; the message has the numbers
+-- BrokenPlan         a plan that breaks a rule: a bug of the solver, found before anything moved
+-- PlanTimeout        nothing found in the time allowed; nothing proven
+-- InvalidTransition  an event that does not belong to the phase the handover is in: a bug of its runner
"""


class PlannerError(Exception):
    """Base of every error of this package."""


class InvalidLayout(PlannerError):
    """The layout is malformed; the message names the stage."""


class UnsupportedModel(PlannerError):
    """The model's files cannot be planned with; the message says which and why."""


class InvalidWorkload(PlannerError):
    """What is said of the workload cannot be; the message names the key."""


class InvalidTrace(PlannerError):
    """A trace cannot be read, or nothing is left of it; the message says where or why."""


class InvalidProfile(PlannerError):
    """A profile cannot be read or fitted, or does not cover a device or layer; the message says which."""


class NoFeasiblePlan(PlannerError):
    """No layout satisfies the constraints; the message has the numbers."""


class BrokenPlan(PlannerError):
    """The solver's answer breaks a rule of ``planner.checker``; the message says which."""


class PlanTimeout(PlannerError):
    """The solver found nothing within its deadline, and proved nothing."""


class InvalidTransition(PlannerError):
    """The handover is in a phase in which this event cannot happen; the message names both."""
