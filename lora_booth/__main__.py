"""`python -m lora_booth` is `lora-booth`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of both; an interrupt ends it quietly, also while the command line is still being loaded."""
    try:
        from lora_booth.cli import app

        app.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
