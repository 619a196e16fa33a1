"""``python -m moec.coverage.worker``: measures the families that come in on stdin, one JSON line each.

It answers with one line a stage; the last one of a family says ``done``. Anything that the families themselves print
goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

import torch

from moec.coverage.families import Family
from moec.coverage.measure import measure


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer until ``requests`` ends.

    Args:
        requests: Lines of ``{"family": {...}, "backends": [...]}``.
        answers: Gets lines of ``{"row": {...}}``, then ``{"done": true}``, for each.
    """

    def say(message: dict[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    for line in requests:
        asked = json.loads(line)
        for row in measure(Family.from_dict(asked["family"]), tuple(asked["backends"])):
            say({"row": row.to_dict()})
        say({"done": True})


def main() -> None:
    """Serves stdin. What the family prints must not be taken for an answer, so stdout is put aside first."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        torch.set_num_threads(1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
