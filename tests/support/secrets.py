"""What people ask and are answered is nobody else's: whether any of it is in what a daemon and its engines wrote."""

from tests.support.daemon import Daemon

DEBUG = 'log.level = "debug"\n'  # of a configuration: all that may be logged
_TELLING = 12  # characters that do not stand in a log by chance


def assert_not_logged(daemon: Daemon, *texts: str) -> None:
    """Neither of these prompts and answers is in the log. A line of each is looked for, as a log may break lines."""
    log = daemon.output.read_text()
    lines = [max(text.splitlines(), key=len).strip() for text in texts]
    assert [line for line in lines if len(line) < _TELLING] == []
    assert [line for line in lines if line[:_TELLING] in log or line[-_TELLING:] in log] == []
