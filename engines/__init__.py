"""What runs a plan: one ``Engine`` protocol and the engines that keep it. Imports ``planner`` and ``topology``."""
