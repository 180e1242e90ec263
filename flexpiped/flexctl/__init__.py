"""The ``flexctl`` command: a client of the admin API, with no private path. Standard library only: it starts fast."""
