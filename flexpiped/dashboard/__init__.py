"""The web dashboard: one page of static files, and a stream of server-sent events that it draws."""
