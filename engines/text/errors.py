"""Errors of text handling, below ``EngineError``.

TextError
+-- TextStartFailed    the process did not become ready; the message has its last words
+-- TextProcessDied    it died more often than is sensible, or while it handled the same call again
+-- TextRefused        the tokenizer or the chat template does not take this input; the message is its own
+-- TextClosed         the owner closed the service
"""

from engines.errors import EngineError


class TextError(EngineError):
    """Base of what can go wrong with text."""


class TextStartFailed(TextError):
    """The text process did not become ready."""


class TextProcessDied(TextError):
    """The text process is gone and is not coming back for this call."""


class TextRefused(TextError):
    """The input cannot be turned into tokens."""


class TextClosed(TextError):
    """The service was closed by its owner."""
