"""Calls of a function, noted while a test runs, and one of them failing."""


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
