"""Compiled kernels of the native engine, built on first use and cached."""
