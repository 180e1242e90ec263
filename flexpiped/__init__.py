"""The daemon and its ``flexctl`` command. It performs what ``planner`` decides, through an engine."""

__version__ = "0.1.0"
