"""Errors of this package.

TopologyError
+-- UnknownDevice   a device is named that is not there
+-- BadSnapshot     a snapshot file cannot be used; the message names the place in it
+-- BadCluster      host snapshots cannot be one cluster
+-- NotMeasured     a measurement could not be made, kept or read
"""


class TopologyError(Exception):
    """Base of what can go wrong here."""


class UnknownDevice(TopologyError):
    """A device is named that is not there."""


class BadSnapshot(TopologyError):
    """A snapshot cannot be used; the message names the file and the place in it."""


class BadCluster(TopologyError):
    """Host snapshots cannot be merged."""


class NotMeasured(TopologyError):
    """A measurement could not be made, kept or read."""
