"""What speaks against a change of a model.

ModelError
+-- UnknownModel   there is no model of that name
+-- WhichModel     there are several, and none was named
+-- ModelBusy      a change of that model is under way
+-- ModelRefused   it is what was asked for already, or cannot be
"""


class ModelError(Exception):
    """Base of what speaks against a change."""


class UnknownModel(ModelError):
    """There is no such model."""


class WhichModel(ModelError):
    """None was named, and there are several."""


class ModelBusy(ModelError):
    """A change of it is under way."""


class ModelRefused(ModelError):
    """It cannot be, or is so already."""
