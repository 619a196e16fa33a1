"""Programs of one ``moe.regroup``."""

from __future__ import annotations

CALL = """
graph @g(%a: i64[A, 2], %b: i64[B, 2]) -> (i64[A], i64[B], i64[A], i64[B]) {{
  %p, %q, %r, %s = moe.regroup [%a, %b] {{{attrs}}} : i64[A], i64[B], i64[A], i64[B]
  return %p, %q, %r, %s
}}
"""
"""Two micro-batches, two experts a token."""

CUT = """
graph @g(%a: i64[T, 2]) -> (i64[(T + 2)//3], i64[(T + 1)//3], i64[T//3], i64[T]) {{
  %p, %q, %r, %s = moe.regroup [%a] {{{attrs}}} : i64[(T + 2)//3], i64[(T + 1)//3], i64[T//3], i64[T]
  return %p, %q, %r, %s
}}
"""
"""One, in three parts."""
