"""Mutated and made-up IR texts for the robustness tests."""

from __future__ import annotations

import random
from collections.abc import Iterator

SEEDS = (
    """graph @g(%x: bf16[T, 4], %i: i64[T, 2]) -> (bf16[2*T, 4], !moe.plan<8>) {
  %r, %p = moe.dispatch %x, %i {experts = 8} : bf16[2*T, 4], !moe.plan<8>
  return %r, %p
}
""",
    """graph @h(%x: f32[s0, 8]) -> f32[s0, 8] {
  %a = moe.activation [%x] {layout = "single"} {
    (%h: f32[R, 8]) -> f32[R, 8] {
      %s = torch.call @aten.relu.default(%h) : f32[R, 8]
      return %s
    }
  } : f32[s0, 8]
  return %a
}
""",
    """graph @k(%x: f32[s0//2, Max(s0, 4)]@cuda:0) {
  // a comment
  %0 = torch.call @a.topk.b(%x, -1.5e3, [true, None], #device<"cpu">, t = bf16, "é\\u00ff" = (1,)) : sym_bool<s0 < 4>
  return template (%x, [%0])
}
""",
    """graph @m(%l: f32[T, 8], %b: f32[8]) {
  %w, %i = moe.route %l, bias = %b {k = 2, scale = 2.5, score_dtype = f64} : f32[T, 2], i64[T, 2]
  return %w, %i
}
""",
)
_WORDS = r"""
graph return template attrs torch.call moe.dispatch moe.route moe.activation moe.experts moe.combine
mo.route @g @aten.add.Tensor @0 @ %x %y %0 % ( ) { } [ ] < > , : = -> - + * ** / // == <= >= ! # $ $0 $9
0 1 8 4096 -1 1e5 1e999 1.5 00 99999999999999999999 f32 bf16 f32[ f32[] bf16[T, i64[T,2] f33 none None
true false inf nan sym_int< sym_bool<s0<4> sym_int<s0*4> !moe.plan<8> !moe.plan !comm.token Max( T s0
!torch.opaque<"a"> "text" " \ "\q" "\ud800" #device<"cpu"> #expr<T//0> #expr<2**99999> #expr<1/0>
Mod(T,0) FloorDiv(T) bias experts k layout ; ' & ~ ^ ? | _ é
"""
TOKENS = [*_WORDS.split(), "\n", "//", "\0", "\ud800", "\u2028", "\r", "\t"]


def mutate(rng: random.Random, text: str) -> str:
    """One to four edits: cut, repeat, swap, or replace pieces, characters and tokens."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        n = len(text)
        a = rng.randrange(n + 1)
        b = min(n, a + rng.choice((1, 1, 1, 2, 5, 20, 80)))
        match rng.randrange(6):
            case 0:
                text = text[:a] + text[b:]
            case 1:
                text = text[:a] + rng.choice(TOKENS) + text[b:]
            case 2:
                text = text[:b] + text[a:b] * rng.choice((1, 1, 2, 30)) + text[b:]
            case 3:
                text = text[:a] + chr(rng.randrange(0x250)) + text[b:]
            case 4:
                text = text[:a] + " " + rng.choice(TOKENS) + " " + text[a:]
            case _:
                c = rng.randrange(n + 1)
                text = text[:a] + text[c : c + 10] + text[b:]
        if not text:
            break
    return text


def texts(seed: int, count: int) -> Iterator[str]:
    """``count`` hostile texts, always the same ones for a seed."""
    rng = random.Random(seed)
    for i in range(count):
        if i % 5 == 4:
            soup = " ".join(rng.choices(TOKENS, k=rng.randint(1, 25)))
            yield soup if i % 2 else f"graph @g(%x: f32[T, 8]) {{ {soup} }}"
        else:
            yield mutate(rng, rng.choice(SEEDS))
