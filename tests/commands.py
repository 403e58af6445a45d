"""The command line as the tests call it."""

import pytest

from hiplora.cli.main import main


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return stop.value.code or 0, said.out, said.err


def succeed(capsys, *arguments):
    """Return the standard output of a command that must succeed."""
    code, said, err = run(capsys, *arguments)
    assert code == 0, err
    return said


def quietly(capsys, *arguments):
    """Return the standard output of a command that must succeed and say nothing on standard error."""
    code, said, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    return said
