"""Keep transformers' own progress bars off a standard error that nobody watches."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers(always: bool = True) -> Iterator[None]:
    """Silence transformers' progress bars inside; with `always=False`, only where stderr is not a terminal."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled() or (sys.stderr.isatty() and not always):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
