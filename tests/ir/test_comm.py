"""The comm dialect: what its ops refuse, what they mean on ranks that are threads, and what is counted."""

from __future__ import annotations

import pytest
import torch

from moec.backends.reference import run_graph
from moec.backends.reference.world import run_ranks, run_world
from moec.ir.comm_semantics import Call, CommError
from moec.ir.errors import VerifyError
from moec.ir.parser import parse_graph
from moec.ir.verifier import verify

ALL = {"g": [[0, 1, 2]]}


def graph(body: str, result: str = "f32[R, 2]", args: str = "%x: f32[T, 2]") -> str:
    return f"graph @c({args}) -> {result} {{\n{body}\n}}"


GATHER = """
  %t = comm.all_gather.start %x, counts = %c {group = "g", ranks = 3} : !comm.token
  %y = comm.wait %t : f32[R, 2]
  return %y"""
SCATTER = """
  %t = comm.reduce_scatter.start %x, counts = %c {group = "g", ranks = 3} : !comm.token
  %y = comm.wait %t : f32[R, 2]
  return %y"""
EXCHANGE = """
  %t = comm.all_to_all.start %x, send = %s, recv = %r {group = "g", ranks = 3} : !comm.token
  %y = comm.wait %t : f32[R, 2]
  return %y"""
REDUCE = """
  %t = comm.all_reduce.start %x {group = "g", ranks = 3} : !comm.token
  %y = comm.wait %t : f32[T, 2]
  return %y"""
COUNTED = "%x: f32[T, 2], %c: i64[3]"


START = {
    "all_to_all": '%t = comm.all_to_all.start %x{operands} {{group = "g", ranks = {n}{more}}} : !comm.token',
    "all_gather": '%t = comm.all_gather.start %x{operands} {{group = "g", ranks = {n}{more}}} : !comm.token',
    "reduce_scatter": '%t = comm.reduce_scatter.start %x{operands} {{group = "g", ranks = {n}{more}}} : !comm.token',
    "all_reduce": '%t = comm.all_reduce.start %x{operands} {{group = "g", ranks = {n}{more}}} : !comm.token',
}


def start(kind: str, operands: str = "", more: str = "", n: int = 3) -> str:
    return START[kind].format(operands=operands, more=f", {more}" if more else "", n=n)


TWICE = start("all_reduce") + "\n %a = comm.wait %t : f32[5, 2]\n %b = comm.wait %t : f32[5, 2]"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (start("all_to_all", ", send = %c"), "send and recv come together"),
        (start("all_to_all", more="send_sizes = (1, 2), recv_sizes = (1, 2)"), "one size a rank"),
        (start("all_gather", more="sizes = (1, 2)"), "each of 3 ranks"),
        (start("all_gather", more="sizes = (1, 2)", n=2), "which no rank does"),
        (start("reduce_scatter", more="sizes = (1,)"), "each of 3 ranks"),
        (TWICE, "a token is waited for once"),
        ("%t = comm.wait %x : f32[5, 2]", "must be a !comm.token"),
        ("%t = comm.all_reduce.start %x {ranks = 3} : !comm.token", "missing its attribute 'group'"),
    ],
)
def test_what_the_verifier_refuses(body: str, says: str) -> None:
    text = graph(body + "\n return %x", "f32[5, 2]", "%x: f32[5, 2], %c: i64[3]")
    with pytest.raises(VerifyError, match=says):
        verify(parse_graph(text))


def test_they_print_and_parse_to_the_same() -> None:
    for body in (GATHER, SCATTER, EXCHANGE, REDUCE.replace("f32[T", "f32[R")):
        made = parse_graph(graph(body, args="%x: f32[T, 2], %c: i64[3], %s: i64[3], %r: i64[3]"))
        assert str(parse_graph(str(made))) == str(made)


def rows(rank: int, count: int) -> torch.Tensor:
    return torch.full((count, 2), float(rank)) + torch.arange(count)[:, None] / 10


def test_all_gather_and_its_pair() -> None:
    counts = torch.tensor([2, 0, 3])
    made = parse_graph(graph(GATHER, args=COUNTED))
    got = run_ranks([made] * 3, [[rows(r, int(counts[r])), counts] for r in range(3)], ALL)
    want = torch.cat([rows(r, int(counts[r])) for r in range(3)])
    assert all(torch.equal(g[0], want) for g in got)
    back = parse_graph(graph(SCATTER, args=COUNTED))
    sums = run_ranks([back] * 3, [[(r + 1) * want, counts] for r in range(3)], ALL)
    for (got_sum,), part in zip(sums, want.split([2, 0, 3]), strict=True):
        torch.testing.assert_close(got_sum, 6 * part)


def test_all_to_all_is_its_own_pair() -> None:
    table = torch.tensor([[1, 2, 0], [0, 0, 3], [2, 1, 1]])  # what rank i sends to rank j
    made = parse_graph(graph(EXCHANGE, args="%x: f32[T, 2], %s: i64[3], %r: i64[3]"))
    inputs = [rows(r, int(table[r].sum()) + 1) for r in range(3)]  # one row stays
    there, worlds = run_world(3, ALL, lambda r: run_graph(made, [inputs[r], table[r], table[:, r]])[0])
    for r, got in enumerate(there):
        parts = [inputs[s].split([*table[s].tolist(), 1])[r] for s in range(3)]
        assert torch.equal(got, torch.cat(parts))
        assert worlds[r].sent["all_to_all", "g"] == int(table[r].sum() - table[r, r]) * 8
    back, _ = run_world(3, ALL, lambda r: run_graph(made, [there[r], table[:, r], table[r]])[0])
    assert all(torch.equal(b, x[:-1]) for b, x in zip(back, inputs, strict=True))


def test_all_reduce_and_gradients_through_the_ranks() -> None:
    made = parse_graph(graph(REDUCE, "f32[T, 2]"))
    leaves = [rows(r, 2).requires_grad_() for r in range(3)]
    outs = run_ranks([made] * 3, [[x] for x in leaves], ALL)
    sum(((r + 1) * out[0]).sum() for r, out in enumerate(outs)).backward()  # type: ignore[union-attr]
    assert all(torch.equal(x.grad, torch.full((2, 2), 6.0)) for x in leaves if x.grad is not None)
    assert all(x.grad is not None for x in leaves)


def test_ranks_in_different_collectives_are_an_error_and_no_deadlock() -> None:
    graphs = [parse_graph(graph(REDUCE, "f32[T, 2]"))] * 2 + [
        parse_graph(graph(REDUCE.replace("all_reduce", "all_gather"), "f32[T, 2]"))
    ]
    with pytest.raises(CommError, match="different collectives: all_gather, all_reduce"):
        run_ranks(graphs, [[rows(r, 2)] for r in range(3)], ALL)


def test_a_rank_that_raises_ends_the_others() -> None:
    def main(rank: int) -> torch.Tensor:
        if rank == 1:
            raise ValueError("rank 1 has had enough")
        return run_graph(parse_graph(graph(REDUCE, "f32[T, 2]")), [rows(rank, 2)])[0]  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="had enough"):
        run_world(3, ALL, main)


def test_sizes_that_do_not_fit() -> None:
    made = parse_graph(graph(REDUCE, "f32[T, 2]"))
    with pytest.raises(CommError, match="outside of any group"):
        run_graph(made, [rows(0, 2)])
    with pytest.raises(CommError, match="made for 3 ranks, the group has 2"):
        run_ranks([made] * 2, [[rows(r, 2)] for r in range(2)], {"g": [[0, 1]]})
    with pytest.raises(CommError, match="rank 0 is in no group 'g'"):
        run_ranks([made] * 3, [[rows(r, 2)] for r in range(3)], {"h": [[0, 1, 2]]})
    exchange = parse_graph(graph(EXCHANGE, args="%x: f32[T, 2], %s: i64[3], %r: i64[3]"))
    ones = torch.ones(3, dtype=torch.int64)
    with pytest.raises(CommError, match="3 rows to send, there are 2"):
        run_ranks([exchange] * 3, [[rows(r, 2), ones, ones] for r in range(3)], ALL)
    with pytest.raises(CommError, match=r"expects \(2, 2, 2\) rows, \(1, 1, 1\) came"):
        run_ranks([exchange] * 3, [[rows(r, 3), ones, 2 * ones] for r in range(3)], ALL)


def test_bytes_of_a_call() -> None:
    x = torch.zeros(6, 5, dtype=torch.bfloat16)
    assert Call("all_to_all", "g", (1, 2, 3), (0, 0, 0)).bytes_sent(x, 2, 3) == 3 * 10
    assert Call("all_gather", "g", (), (6, 6, 6)).bytes_sent(x, 0, 3) == 2 * 60
    assert Call("reduce_scatter", "g", (1, 2, 3)).bytes_sent(x, 0, 3) == 5 * 10
    assert Call("all_reduce", "g").bytes_sent(x, 0, 3) == 2 * 2 * 60 // 3
    assert Call("all_to_all", "g", (0, 0), (0, 0)).bytes_sent(x[:0], 0, 2) == 0
