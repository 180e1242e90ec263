"""Text to token ids and back, in a process of its own: no tokenisation happens on the daemon's loop."""
