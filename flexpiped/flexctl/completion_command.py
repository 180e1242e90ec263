"""``flexctl completion``: what a shell needs to complete its commands."""

import argparse

import shtab

from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.commands import Exit
from flexpiped.flexctl.parser import flexctl_parser
from flexpiped.flexctl.parser_walk import options_of, subcommands_of
from flexpiped.flexctl.terminal import Screen

_COMPLETED_AS = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY, "FOLDER": shtab.DIRECTORY}


def completion(_client: AdminClient, screen: Screen, options: argparse.Namespace) -> Exit:
    """Write the script for one shell."""
    parser = flexctl_parser()
    _complete_paths(parser)
    screen.write([shtab.complete(parser, shell=options.shell)])
    return Exit.DONE


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Have values that are files or directories by their name in the help completed as such."""
    for action in options_of(parser):
        if action.metavar in _COMPLETED_AS:
            action.complete = _COMPLETED_AS[action.metavar]  # type: ignore[attr-defined]  # what shtab reads
    for _, _, sub in subcommands_of(parser):
        _complete_paths(sub)
