"""``python -m moec``: the ``moec`` script of a checkout that is not installed."""

from __future__ import annotations

from moec.cli.app import main

if __name__ == "__main__":
    main()
