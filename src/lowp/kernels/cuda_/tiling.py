"""How the mixed product is cut: what a tiling is, which ones suit a case, and a model of the time to choose by.

A tile is 64 * mt * wgs rows of the weight by bm tokens; one block of threads works on it, or `split` blocks of a cluster that
share its columns. Where the last round of tiles would leave processors idle, it is streamed: cut into equal parts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ...layouts.fragments import UNIT

_SHARED = 226 * 1024  # of one block on sm90, less what a kernel has of its own: its barriers, at most 256 bytes
_SHARED_OF_PROCESSOR = 228 * 1024
_OWN = 1024 + 256  # of each block: what the driver takes, and the barriers
_OUT_PITCH = 72 * 2  # bytes between tokens, as OUT_PITCH in fragments.cu


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut.

    Args:
        mt: tiles of 64 rows of a warpgroup. wgs: warpgroups that multiply. bm: tokens of a tile.
        kc: chunks of 64 columns of a stage. stages: of the pipeline. split: blocks of a cluster that share the columns of a tile.
        blocks: resident on one processor. stream: 1 where what does not fill a last round of tiles is cut into equal parts.
        band: tiles of tokens that run side by side, see tile_at in fragments.cu.
    """

    mt: int = 1
    wgs: int = 1
    bm: int = 8
    kc: int = 4
    stages: int = 4
    split: int = 1
    blocks: int = 1
    stream: int = 0
    band: int = 16

    @property
    def rows(self) -> int:
        """Rows of the weight of a block."""
        return 64 * self.mt * self.wgs

    @property
    def threads(self) -> int:
        """Of a block, as THREADS in product.cu."""
        return 128 * self.wgs + (128 if self.wgs == 2 and self.mt * self.bm >= 128 else 32)

    def grid(self, tokens: int, rows: int, columns: int, processors: int) -> int:
        """Number of blocks; where they stream each gets 512 columns of a tile at least."""
        tiles = -(-rows // self.rows) * -(-tokens // self.bm)
        if self.stream:
            return max(1, min(processors, tiles * columns // 512))
        return tiles * self.split if self.split > 1 else min(tiles, processors * self.blocks)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The weight is decoded first, to a workspace, so many rows at a time (a multiple of 64), and cuBLAS multiplies."""

    decoded_rows: int


WORKSPACE = 256 << 20  # bytes of decoded rows, at most: less is slower from 64 MB down, more is only memory


_RESIDENT = 16 << 20  # bytes of a decoded weight that is read back from the L2 cache


def by_decoding(rows: int, columns: int) -> Decoded:
    """The whole weight at once where it fits the workspace, else equal pieces that do, of whole tiles of 256 rows."""
    most = max(256, WORKSPACE // (2 * columns) // 256 * 256)
    pieces = -(-rows // most)
    return Decoded(decoded_rows=min(rows, -(-rows // pieces // 256) * 256))


def decoded_from(rows: int, columns: int, numbers: dict[str, int]) -> int | None:
    """From how many tokens on decoding first is the faster way; None: never, as far as was measured (an H200, to 4096 tokens).

    cuBLAS is 1.02 to 1.2 times as fast as the product that decodes for every 256 tokens anew, more where decoding takes longer; a
    decoded weight costs about 0.5 ps a number, what cuBLAS does in 200 tokens. One that stays in the L2 cache costs half of that,
    and has few tiles, which cuBLAS shares out better.
    """
    if numbers["X_BITS"] == 8 or numbers["GROUP"] == 0:
        return None
    if 2 * rows * columns <= _RESIDENT:
        return 512
    return 2048 if numbers["KIND"] == 1 else 4096


def _bytes(tiling: Tiling, numbers: dict[str, int]) -> tuple[int, int]:
    """Dynamic shared memory of a block: of one stage, and of all else. As the constants of product.cu."""
    bits, group = numbers["PW0"] + numbers["PW1"] + numbers["PW2"], numbers["GROUP"]
    scale = (2, 2, 4, 1, 1, 1)[numbers["SCALE"]] + (0, 1, 1, 2, 2, 4)[numbers["ZERO"]]
    groups = 0 if not group else max(1, 64 * tiling.kc // group)
    codes = tiling.mt * tiling.wgs * (tiling.kc * 512 * bits + groups * 64 * scale)
    table, out = 32768 if numbers["KIND"] == 2 else 0, tiling.wgs * min(tiling.bm, 64) * _OUT_PITCH
    x = tiling.kc * tiling.bm * 8 * numbers["X_BITS"]
    return -(-(x + codes) // 1024) * 1024, 1024 + table + (out if tiling.split == 1 else 0)


def shared_bytes(tiling: Tiling, numbers: dict[str, int]) -> int:
    """Dynamic shared memory of a block."""
    stage, rest = _bytes(tiling, numbers)
    sums = tiling.bm * (tiling.rows + 4) * 4 if tiling.split > 1 else 0
    return rest + max(tiling.stages * stage, sums)


_SHAPES = (  # mt, wgs, kc, most stages, blocks on a processor: for up to so many tokens in a tile
    (16, ((1, 1, 4, 4, 4), (1, 2, 4, 4, 2), (2, 1, 4, 4, 3))),
    (64, ((1, 1, 2, 4, 3), (1, 2, 2, 4, 2), (2, 2, 2, 4, 1))),
    (128, ((1, 2, 2, 4, 1), (2, 2, 1, 6, 1))),
    (256, ((1, 2, 1, 6, 1),)),
)
_SHAPES_FLOAT8 = (  # the same where x is e4m3: a chunk of x is 128 columns
    (16, ((1, 1, 4, 4, 4), (1, 2, 4, 4, 2), (2, 1, 4, 4, 3))),
    (64, ((1, 1, 4, 4, 3),)),
    (128, ((1, 2, 4, 4, 1),)),
    (256, ((1, 2, 2, 6, 1),)),
)
_MOST_RUNNING = 8192  # columns of RUNNING sums (multiply8.cu): their error, 2e-3 at 4096, grows with K: 7e-3 at 28672


def candidates(tokens: int, columns: int, numbers: dict[str, int]) -> list[Tiling]:
    """Tilings worth asking about for a batch: the smallest tile that holds it, and for large batches those below.

    Args:
        tokens, columns: M and K. numbers: the weight's format, as mixed.py tells it to the compiler.
    """
    holds, float8 = min(256, max(8, 1 << (tokens - 1).bit_length())), numbers["X_BITS"] == 8
    found = []
    coarse = float8 and (numbers["F16"] or columns > _MOST_RUNNING)  # RUNNING sums would be
    many = (128, 64) if coarse else (256, 128, 64)
    for bm in (holds,) if holds <= 32 else (holds, holds // 2) if holds <= 128 else many:
        for mt, wgs, kc, most, blocks in next(
            shapes for limit, shapes in (_SHAPES_FLOAT8 if float8 else _SHAPES) if bm <= limit
        ):
            base = Tiling(mt=mt, wgs=wgs, bm=bm, kc=kc, stages=2, blocks=blocks, band=4 if bm == 256 else 16)
            shared = [dataclasses.replace(base, split=split) for split in ((1,) if bm == 256 else (1, 2, 4, 8))]
            streamed = [dataclasses.replace(base, stream=1)] if bm >= 128 else []
            found += [one for one in (_fitted(each, most, columns, numbers) for each in (*shared, *streamed)) if one]
    return found


def _fitted(tiling: Tiling, most: int, columns: int, numbers: dict[str, int]) -> Tiling | None:
    """The tiling with as many stages as fit, or None where it does not suit these columns."""
    chunks, group, float8 = columns // UNIT, numbers["GROUP"], numbers["X_BITS"] == 8
    smallest = 2 if float8 else 1
    while tiling.kc > smallest and (
        chunks % tiling.kc or (group and group % (64 * tiling.kc) and (64 * tiling.kc) % group)
    ):
        tiling = dataclasses.replace(tiling, kc=tiling.kc // 2)
    odd = not float8 and tiling.mt == 1 and tiling.kc == 1
    turn = tiling.kc * (2 if odd else 1)  # chunks of a turn: TURNS in multiply16.cu and multiply8.cu
    if chunks % turn or chunks // turn < 2 * tiling.split:
        return None
    stage, rest = _bytes(tiling, numbers)
    for blocks in range(tiling.blocks, 0, -1):
        room = _SHARED if blocks == 1 else _SHARED_OF_PROCESSOR // blocks - _OWN
        fitted = dataclasses.replace(tiling, stages=min(most, (room - rest) // stage), blocks=blocks)
        if fitted.stages >= min(3, most) and shared_bytes(fitted, numbers) <= _SHARED:
            return fitted
    return None


def choose(tokens: int, rows: int, columns: int, numbers: dict[str, int], processors: int) -> Tiling | None:
    """The tiling of a batch by rule; None where no tiling suits these columns.

    Up to 64 tokens what counts is that enough bytes are on their way: blocks of 64 rows, their columns split until there are
    two or three for each multiprocessor; with plenty of rows larger blocks, which read x less often. Above, a model of the time.
    """
    found = candidates(tokens, columns, numbers)
    if not found:
        return None
    if tokens > 64:
        # What the model was fitted to.
        fitted = [one for one in found if (one.mt, one.wgs) == (1, 1 if one.bm == 64 else 2)]
        return min(
            fitted or found, key=lambda one: estimate_us(one, tokens, rows, columns, processors, numbers["X_BITS"])
        )
    bm, units, chunks, float8 = found[0].bm, -(-rows // UNIT), columns // UNIT, numbers["X_BITS"] == 8
    bits = numbers["PW0"] + numbers["PW1"] + numbers["PW2"]
    least, enough = 16, 2.4 if bm <= 16 else 1.45  # chunks of a block; blocks of 64 rows for each multiprocessor
    if bm == 64 and 8 * units < 1.45 * processors:  # so few rows that the tokens are shared out too
        bm, least = 32, 8
    few = bm <= (8 if not float8 else 16)
    many = bm != 16 and units >= 1.6 * processors and (few or not float8)
    mt, wgs = 1, 1
    if numbers["KIND"] == 2:  # a codebook's table is filled once a block
        wgs = 2
    elif many:
        mt, wgs = (2, 2) if bm == 64 and units >= 3.3 * processors else (1, 2)
    elif bits <= 4 and (few or (bm == 16 and chunks < 128)):  # a block of 128 rows reads x half as often
        most_units = 1.1 if float8 and chunks >= 128 else 0.62
        mt = 2 if 0.3 * processors <= units <= most_units * processors else 1
        wgs = 2 if few and not float8 and mt == 1 and 0.62 * processors < units <= 0.9 * processors else 1
    suited = [one for one in found if (one.bm, one.mt, one.wgs) == (bm, mt, wgs)] or found
    resident = processors * wgs * max(one.blocks for one in suited)  # in blocks of 64 rows
    most = min(8, resident // units)
    if float8 and not few:  # a product that is done sooner waits for the sums of others longer
        most = min(most, max(128 // bm, int(0.6 * processors) // units))
    split = 1
    while 2 * split <= most and units * split < enough * processors and chunks // (2 * split) >= least:
        split *= 2
    if many:
        split = 2 if units <= 2 * processors else 1
    elif mt == 2:
        split = min(8 if few else 4, 2 * split)
    return min(suited, key=lambda one: abs(one.split - split))


def plan(tokens: int, rows: int, columns: int, numbers: dict[str, int], processors: int) -> Tiling | Decoded:
    """What a batch runs by, by rule: a tiling, or decoding first."""
    least = decoded_from(rows, columns, numbers)
    if least is not None and tokens >= least:
        return by_decoding(rows, columns)
    return choose(tokens, rows, columns, numbers, processors) or by_decoding(rows, columns)


@dataclass(frozen=True, kw_only=True)
class _Model:
    """Microseconds by tokens of a tile: of a chunk of 64 columns, of a block's end, of the first share of a cluster's sums, of
    streaming; and of a start, of each more block of a cluster (a part of the first share), of a chain of stages by the chunk."""

    chunk: dict[int, float]
    end: dict[int, float]
    add: dict[int, float]
    stream: dict[int, float]
    start: float
    chain: float
    add_block: float = 0.25


# By bits of a number of x, fitted to sweeps of more than 64 tokens. 16: on an H100; the choice is 0.5 % slower than the best on
# average, 10 % at most. 8: on an H200, 0.5 % and 6 %; its start holds the cast.
_MODELS = {
    16: _Model(
        chunk={64: 0.135, 128: 0.372, 256: 0.703}, end={64: 0.60, 128: 1.33, 256: 0.0}, add={64: 0.34, 128: 1.74},
        stream={128: 10.9, 256: 13.9}, start=2.75, chain=0.29,
    ),
    8: _Model(
        chunk={64: 0.095, 128: 0.294, 256: 0.575}, end={64: 0.36, 128: 0.0, 256: 0.11}, add={64: 1.2, 128: 4.3},
        stream={128: 14.2, 256: 19.7}, start=5.2, chain=0.17,
    ),
}  # fmt: skip


def estimate_us(tiling: Tiling, tokens: int, rows: int, columns: int, processors: int, x_bits: int = 16) -> float:
    """A model of the time of a product of more than 64 tokens, in microseconds, to compare tilings by.

        rounds of blocks * (chunks of a block * time of a chunk + its end)

    Blocks of 64 rows and tokens fit three to a processor: they come in no rounds, but none is faster than its chain of stages.
    """
    model, bm, chunks = _MODELS[x_bits], tiling.bm, columns / UNIT
    tiles = -(-rows // tiling.rows) * -(-tokens // bm)
    wide = tiling.mt * tiling.wgs / (1 if bm == 64 else 2)  # rows of a block, in those of the fitted one
    chunk, end = model.chunk[bm] * wide, model.end[bm] * wide
    if tiling.stream:  # its blocks read different columns at a time: what they share must stay in the L2 cache
        shared = 1.02 if tokens * columns * x_bits < 640e6 else 1.3
        return model.start + shared * tiles / processors * (chunks * chunk + end) + model.stream[bm]
    blocks = tiles * tiling.split / processors
    rounds = max(1.0, blocks) if bm == 64 else math.ceil(blocks)
    add = model.add[bm] * (1 + model.add_block * tiling.split) if tiling.split > 1 else 0.0
    time = model.start + rounds * (chunks / tiling.split * chunk + end + add)
    return max(time, model.start + chunks / tiling.split * model.chain + end) if bm == 64 else time
