"""Rows left in a box and taken from it: what was sent, in any order of taking, however often the box comes round."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from moec.testing import handover
from moec.testing.handover import Boxes

RANKS, ROOM = 3, 4096


class Store(dict[str, bytes]):
    """What ranks tell each other, in one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def wait(self, keys: list[str]) -> None:
        """All are made in turn by this thread: the first does not wait for the others."""


def boxes(monkeypatch: pytest.MonkeyPatch) -> list[Boxes]:
    file = handover._file
    monkeypatch.setattr(handover, "_file", lambda bytes: (file(bytes)[0], lambda: None))  # the others come later
    store = Store()
    return [Boxes(store, rank, RANKS, ROOM) for rank in range(RANKS)]


def send(made: list[Boxes], number: int, sizes: list[list[int]], rows: list[Tensor]) -> list[int]:
    return [box.leave(number, rows[r], sizes[r]) for r, box in enumerate(made)]


def receive(made: list[Boxes], number: int, places: list[int], sizes: list[list[int]], rows: list[Tensor]) -> None:
    """Every rank's rows, compared with what all-to-all means."""
    for me, box in enumerate(made):
        came = [row[me] for row in sizes]
        out = rows[0].new_empty((sum(came), *rows[0].shape[1:]))
        first = sum(sizes[me][:me])
        box.take(number, places, out, came, rows[me][first : first + sizes[me][me]])
        want = [r[sum(s[:me]) : sum(s[: me + 1])] for r, s in zip(rows, sizes, strict=True)]
        assert torch.equal(out, torch.cat(want))


def draw(rng: random.Random) -> tuple[list[list[int]], list[Tensor]]:
    sizes = [[rng.choice((0, 1, rng.randint(0, 20))) for _ in range(RANKS)] for _ in range(RANKS)]
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.int64, torch.bool))
    shape = rng.choice(((), (3,), (2, 2)))
    return sizes, [torch.randint(0, 2, (sum(s), *shape)).to(dtype) for s in sizes]


@pytest.mark.parametrize("seed", range(4))
def test_all_get_what_was_sent_though_boxes_come_round(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng, made = random.Random(seed), boxes(monkeypatch)
    under_way: list[tuple[int, list[int], list[list[int]], list[Tensor]]] = []
    for number in range(200):
        sizes, rows = draw(rng)
        under_way.append((number, send(made, number, sizes, rows), sizes, rows))
        while len(under_way) > rng.choice((0, 1, 2, 2, 2, 2)):
            receive(made, *under_way.pop(rng.randrange(len(under_way))))  # not in order


def test_what_was_not_taken_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "PATIENCE", 0.05)
    made, rows = boxes(monkeypatch), [torch.zeros(RANKS, 400, dtype=torch.uint8)] * RANKS
    each = [[1] * RANKS] * RANKS
    places = [send(made, n, each, rows) for n in range(3)]
    with pytest.raises(RuntimeError, match="3 messages fill a box of 4096 bytes"):
        send(made, 3, each, rows)
    receive(made, 1, places[1], each, rows)
    with pytest.raises(RuntimeError, match="nobody takes them"):
        send(made, 3, each, rows)
    receive(made, 0, places[0], each, rows)
    assert send(made, 3, each, rows) == [0] * RANKS, "the first two are free"
    with pytest.raises(RuntimeError, match="2 messages fill"):
        send(made, 4, each, rows)  # behind the last, and before the one that is still there


def test_a_message_that_never_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="does not fit into a box of 4096"):
        boxes(monkeypatch)[0].leave(0, torch.zeros(RANKS, ROOM, dtype=torch.uint8), [1] * RANKS)
