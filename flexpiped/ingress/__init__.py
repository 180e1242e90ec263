"""Processes that serve HTTP, where one is not enough: the daemon keeps everything else."""
