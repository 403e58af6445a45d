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


def watch(monkeypatch, owner, name, fail_at=None, error=KeyboardInterrupt):
    """Return a list to which the arguments of each call of a function are added; its `fail_at`-th call fails."""
    original, calls = getattr(owner, name), []

    def watched(*arguments, **options):
        calls.append(arguments)
        if len(calls) == fail_at:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, watched)
    return calls
