"""The native engine: an engine core process (scheduler) and one resident stage worker process per device."""
