"""Runs one peer on a tiny layer against a loop in f32. Prints one line of JSON: ``{"reason": null}`` if it can be used.

    python benchmarks/probe.py PEER DTYPE

moe_layer.py starts it, so that a kernel that ends its process ends this one.
"""

from __future__ import annotations

import json
import sys

import torch

from ours import make_weights
from peers import RefusalError, make_peer
from routing import Batch, draw_ids, draw_tokens
from shapes import DTYPES, Shape
from timing import error_of, verdict

TINY = Shape("tiny", 256, 128, 8, 2)


def main() -> None:
    """Reads the command line, runs, prints."""
    name, dtype = sys.argv[1:]
    torch.manual_seed(0)
    reason = None
    with torch.no_grad():
        weights = make_weights(TINY, DTYPES[dtype], 1)
        try:
            peer = make_peer(name, TINY, weights)
            for tokens in (1, 40):
                ids = draw_ids(TINY, tokens, 0.0)
                x, w = draw_tokens(TINY, tokens, DTYPES[dtype])
                batch = Batch(x, ids, ids.to(torch.int32), w)
                reason = reason or verdict(error_of(peer.calls[0](batch), batch, weights[0]), DTYPES[dtype])
        except (RefusalError, RuntimeError) as error:
            reason = (str(error).splitlines() or ["an error without a message"])[0][:200]
    print(json.dumps({"reason": reason}))


if __name__ == "__main__":
    main()
