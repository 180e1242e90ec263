"""What an argument parser has in it, read for those who make completions and manual pages of it."""

import argparse
from collections.abc import Iterator


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what a parser takes, without its subcommands."""
    return [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]


def subcommands_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield name, meaning and parser of each subcommand."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            meanings = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                yield name, meanings[name], sub
