"""One call of a layer: its buffers, whose sizes depend on the number of tokens alone, and its launches in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.backends.triton.kernels.experts import up_weights
from moec.backends.triton.kernels.rows import RowFunction
from moec.backends.triton.kernels.sort import CHUNK, most_blocks
from moec.backends.triton.kernels.text import cdiv
from moec.backends.triton.launcher import LaunchKernel
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.spec import Spec
from moec.ir.scaled_semantics import SCALED
from moec.ir.torch_dtypes import TO_TORCH

COMBINE_COLUMNS = 512
"""Columns of a program that adds up slots."""
DESCRIPTOR_BYTES = 16
"""Alignment that tensor descriptors ask of a base and of strides."""
_ONE_HEIGHT = Tile(16, 16, 16), Tile(16, 16, 16)

Values = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A call.

    Attributes:
        spec: The layer, its weights as they lie.
        launch: How the kernels run.
        launcher: The kernels.
        tokens: T, at least 1.
    """

    spec: Spec
    launch: Launch
    launcher: LaunchKernel
    tokens: int

    @property
    def slots(self) -> int:
        return self.tokens * self.spec.top_k

    def layer(self, up: Values, down: Values, captures: Values, post_captures: Values) -> Tensor:
        """The result [T, N].

        Args:
            up, down: Arguments of the kernels by name.
            captures, post_captures: Those of functions of whole rows.
        """
        if self.spec.fp8:
            up |= self._quantized("x", up["x"], 0)
        if self.launch.form == "gemv":
            return self._vectors(up, down, captures, post_captures)
        placed = self.sort(up["ids"], self.launch.up.block_m, (self.launch.up, self.launch.down))
        places = [{"places": placed.pop(f"{gemm}_places")} for gemm in ("up", "down")]
        return self._gemms(up | placed | places[0], down | placed | places[1], captures, post_captures)

    def sort(self, ids: Tensor, block_m: int, tiles: tuple[Tile, Tile] = _ONE_HEIGHT) -> Values:
        """Slots by expert, aligned to blocks of rows: ``rows``, ``experts`` and ``used``; and the places of tiles.

        Args:
            ids: The experts of every token.
            block_m: Rows of a block.
            tiles: Of the up and of the down GEMM. Where they have several heights ``up_places`` and ``down_places``
                say which tile each program has.
        """
        spec, chunks, units = self.spec, cdiv(self.slots, CHUNK), tiles[0].units
        blocks = most_blocks(self.slots, spec.experts, block_m)
        row_tiles = most_blocks(self.slots, spec.experts, block_m * units) if units > 1 else 0

        def ints(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=ids.device)

        placed = {"rows": ints(blocks * block_m), "experts": ints(blocks), "used": ints(1)}
        constants = {"BLOCK_M": block_m, "UNITS": units}
        widths = (spec.up, spec.out // 2 if tiles[1].halves else spec.out)
        for gemm, tile, width in zip(("up", "down"), tiles, widths, strict=True):
            columns = cdiv(width, tile.block_n) if units > 1 else 1
            placed[f"{gemm}_places"] = ints(row_tiles * columns, torch.int64)
            order = (columns, tile.group_m, tile.late) if units > 1 else (1, 1, 0)
            constants |= dict(zip((f"{gemm.upper()}_{n}" for n in ("COLUMNS", "GROUP", "LATE")), order, strict=True))
        values = {"ids": ids, "slots_n": self.slots, "chunks": chunks, **placed}
        if chunks == 1 and blocks <= CHUNK:
            self.launcher("sort_few", self.tokens, values, constants)
            return placed
        values |= {"counts": ints(chunks * spec.experts), "totals": ints(spec.experts)}
        for name in ("count", "offsets", "place"):
            self.launcher(name, self.tokens, values, constants)
        return placed

    def _gemms(self, up: Values, down: Values, captures: Values, post_captures: Values) -> Tensor:
        spec, launch, x = self.spec, self.launch, down["x"]
        block_m = launch.up.block_m
        rows = most_blocks(self.slots, spec.experts, block_m) * block_m
        up["a"] = a = x.new_empty((rows, spec.up))
        self._gemm("up", up, launch.up, up_weights(spec))
        down |= self._between(a, down, captures, block_m)
        if launch.atomic and spec.post is None:
            down["y"] = y = x.new_zeros((self.tokens, spec.out), dtype=torch.float32)
            self._gemm("down_atomic", down, launch.down, ("w",))
            return y.to(TO_TORCH[spec.out_dtype])
        split = launch.down.split_k if spec.post is None else 1
        if split > 1:
            down["o"] = x.new_empty((split, self.slots, spec.out), dtype=torch.float32)
            self._gemm("down_parts", down, launch.down, ("w",), SPLIT_K=split)
            return self._combine("combine_parts", down, SPLIT_K=split)
        down["o"] = x.new_empty((self.slots, spec.out))
        self._gemm("down_halves" if launch.down.halves else "down", down, launch.down, ("w",))
        down["o"] = self._post(down["o"], post_captures)
        return self._combine("combine", down)

    def _vectors(self, up: Values, down: Values, captures: Values, post_captures: Values) -> Tensor:
        spec, x = self.spec, down["x"]
        up["a"] = a = x.new_empty((self.slots, spec.up))
        self._vector("up_vector", up, self.launch.up)
        down |= self._between(a, _every(x), captures, 0)
        if spec.post is None:
            down["y"] = y = x.new_empty((self.tokens, spec.out), dtype=TO_TORCH[spec.out_dtype])
            self._vector("down_vector", down, self.launch.down)
            return y
        down["o"] = x.new_empty((self.slots, spec.out))
        self._vector("down_vector", down, self.launch.down)
        down["o"] = self._post(down["o"], post_captures)
        return self._combine("combine", down)

    def _gemm(self, name: str, values: Values, tile: Tile, weights: tuple[str, ...], **constants: int) -> None:
        constants |= {
            "UNITS": tile.units,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_M": tile.group_m,
            "TMA": tile.tma and all(self._describable(values, w) for w in weights),
            "PROGRAMS": self.launch.programs,
        }
        constants["AHEAD"] = tile.ahead if constants["TMA"] else 0
        self.launcher(name, self.tokens, values, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)

    def _describable(self, values: Values, weight: str) -> bool:
        """Whether a weight lies so that a tensor descriptor can say where."""
        if not self.spec.stacked:
            return False
        t = values[weight]
        strides = (values[f"{weight}_se"], values[f"{weight}_s"])
        return not any(n % DESCRIPTOR_BYTES for n in (t.data_ptr(), *(s * t.element_size() for s in strides)))

    def _vector(self, name: str, values: Values, tile: Tile) -> None:
        constants = {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        self.launcher(name, self.tokens, values, constants, num_warps=tile.num_warps, num_stages=tile.num_stages)

    def _between(self, a: Tensor, placed: Values, captures: Values, block_m: int) -> Values:
        """The rows of the down GEMM."""
        a = self._activation(a, placed, captures, block_m)
        return self._quantized("a", a, block_m, used=placed["used"]) if self.spec.fp8 else {"a": a}

    def _quantized(self, name: str, rows: Tensor, block_m: int, **placed: Tensor) -> Values:
        """Rows in fp8 and their scales."""
        values = rows.new_empty(rows.shape, dtype=torch.float8_e4m3fn)
        scales = rows.new_empty((rows.shape[0], cdiv(rows.shape[1], SCALED)), dtype=torch.float32)
        given = {"source": rows, "source_s": rows.stride(0), "rows_n": rows.shape[0]}
        made = {"values": values, "scales": scales}
        self.launcher(f"quantize_{name}", self.tokens, given | made | placed, {"BLOCK_M": block_m})
        return {name: values, f"{name}_scale": scales} | ({"x_s": values.stride(0)} if name == "x" else {})

    def _activation(self, a: Tensor, placed: Values, captures: Values, block_m: int) -> Tensor:
        """The activation of rows, where the up GEMM's epilogue is not it."""
        if not isinstance(self.spec.activation, RowFunction):
            return a
        result = a.new_empty((a.shape[0], self.spec.inner))
        which = {name: placed[name] for name in ("rows", "used")}
        values = {"source": a, "result": result, **which, **captures}
        self.launcher("activation", self.tokens, values, {"BLOCK_M": block_m})
        return result

    def _post(self, o: Tensor, captures: Values) -> Tensor:
        """The function of rows after the down GEMM."""
        if self.spec.post is None:
            return o
        result = o.new_empty((self.slots, self.spec.width), dtype=TO_TORCH[self.spec.row_dtype])
        self.launcher("post", self.tokens, {"source": o, "result": result, **_every(o), **captures}, {"BLOCK_M": 0})
        return result

    def _combine(self, name: str, values: Values, **constants: int) -> Tensor:
        dtype = TO_TORCH[self.spec.out_dtype]
        values["y"] = y = values["x"].new_empty((self.tokens, self.spec.width), dtype=dtype)
        self.launcher(name, self.tokens, values, {"BLOCK_N": COMBINE_COLUMNS, **constants})
        return y


def _every(like: Tensor) -> Values:
    """In the place of sorted rows where there is a row for each slot: arguments that nobody reads."""
    nothing = like.new_empty(0, dtype=torch.int32)
    return {"rows": nothing, "used": nothing}
