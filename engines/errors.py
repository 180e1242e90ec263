"""Errors of the engines.

EngineError
+-- EngineStartFailed       the engine did not become ready; the message has the reason and its last words
+-- EngineDied              the engine's process ended; requests in flight go on elsewhere from the caller's copy
+-- EngineClosed            the caller closed the engine
+-- UnsupportedByEngine     model, parameter or layout that this engine cannot do; the message names it
+-- KvTransferFailed        a request's KV cache did not get to another engine; it can be computed again there
+-- AdapterRefused          a LoRA adapter that cannot be had, or is not there; nothing has changed
+-- InvalidRequest          the request cannot be run as it is (names the parameter)
+-- RefactoringError
    +-- RefactoringBusy     another refactoring is under way (the message says which and where it stands)
    +-- RefactoringRefused  infeasible or meaningless; nothing moved
    +-- RefactoringAborted  failed, timed out or cancelled before commit; rolled back, no request disturbed
"""


class EngineError(Exception):
    """Base of every error of this package."""


class EngineStartFailed(EngineError):
    """The engine did not become ready."""


class EngineDied(EngineError):
    """The engine's process ended while it was needed."""


class EngineClosed(EngineError):
    """The engine was closed by its owner."""


class UnsupportedByEngine(EngineError):
    """What was asked for is not something this engine does."""


class KvTransferFailed(EngineError):
    """A request's KV cache was not written, or cannot be loaded. Nothing is lost: it is computed again."""


class AdapterRefused(EngineError):
    """An adapter cannot be read, is there already, or is not there. Nothing has changed."""


class InvalidRequest(EngineError):
    """A request that cannot be run; ``parameter`` names what is wrong with it, ``code`` says for machines what is."""

    def __init__(self, message: str, *, parameter: str, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


class RefactoringError(EngineError):
    """Base of what can go wrong with a refactoring."""


class RefactoringBusy(RefactoringError):
    """Another refactoring is under way."""


class RefactoringRefused(RefactoringError):
    """The refactoring was refused before anything moved."""


class RefactoringAborted(RefactoringError):
    """The refactoring was rolled back before its commit point."""
