"""How a command ends: one line for what a user got wrong, and how to go on after Ctrl-C."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm

from moe_backbone import ranks

logger = logging.getLogger(__name__)


@contextmanager
def ending(go_on: str = "") -> Iterator[None]:
    """Around the work of a command line; a line of the log does not cut a progress bar meanwhile.

    Args:
        go_on: How to, said after Ctrl-C; nothing where a command begins anew.

    Raises:
        SystemExit: With one line for a `ValueError` or an `OSError`, with 130 for Ctrl-C.
    """
    try:
        with logging_redirect_tqdm():
            yield
    except KeyboardInterrupt:
        logger.info("\nstopped%s", f"; {go_on}" if go_on else "")
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    finally:
        ranks.leave()
