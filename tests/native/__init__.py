"""The native engine in real processes."""
