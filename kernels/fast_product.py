"""How the product with the fast layout is launched: a table per device, by shape of the matrix and rows of activations.

The tables are in configs.py; scripts/bench_kernels.py --only fast_fused measures what they choose among.
"""

from dataclasses import dataclass, replace

from vllm_dfloat.codec import fast_layout

MAX_PARTS = 8
MAX_AHEAD_ROWS = 32  # of activations, for fast_matmul_ahead.py
MAX_DOT_ROWS = 64  # likewise, for any kernel but fast_matmul_bands.py
MAX_AT_ONCE = 64  # likewise, of a program of fast_matmul_bands.py: for more there are more programs
# Rows of weights of a warp in fast_matmul_bands.py: few for up to MAX_LOW_ROWS rows of activations, more for others.
LOW_BAND, TALL_BAND, MAX_LOW_ROWS = 16, 32, 16
# Of kernels that add in order: rows of weights that give 128 multiprocessors a program of TALL_BANDS, or two of
# LOW_BANDS, and as many warps as these run at once with 126 registers; no GPU has tried others.
IN_ORDER_ROWS, IN_ORDER_WARPS = 128 * 128, 2048


@dataclass(frozen=True)
class DotShape:
    """How the kernel with tensor cores is launched.

    Attributes:
        rows: rows of w per program, 16, 32, 64 or 128; 16 * warps divides it.
        cols: columns at a time, 128 or 256; with one stage 128, or for up to 16 rows 128 * warps.
        stages: how many times as many columns are in shared memory; 1 for the kernels that have the next ones in
            registers, with width 4: fast_matmul_ahead.py for 16 rows, or 8 if in order, and up to MAX_AHEAD_ROWS rows
            of activations; fast_matmul_bands.py for LOW_BAND or TALL_BAND rows per warp.
        warps: 4, or 8 for 128 rows, for the tensor cores of a warp group, which Hopper has; 1 or 2 for those of a warp.
            With one stage and up to 16 rows 1, or in order 1, 2 or 4, each with 128 columns; else one for each band.
        parts: parts of the columns.
        width: neighbouring columns that a thread holds of the operands: 2 for the tensor cores of a warp group, 4 for
            those of a warp. With the wrong one the result is as good, but weights are exchanged between threads.
        in_order: each step of the tensor cores takes the next 16 columns, each at its place in the step. With one part,
            and the right width, this is the order of a plain product of Triton. Weights are exchanged between threads.
            So it is in fast_matmul_bands.py always; then this says that columns are not cut in parts.
    """

    rows: int = 64
    cols: int = 128
    stages: int = 3
    warps: int = 4
    parts: int = 1
    width: int = 2
    in_order: bool = False

    @property
    def has_bands(self) -> bool:
        """Whether fast_matmul_bands.py is launched."""
        return self.stages == 1 and self.rows > 16

    @property
    def band(self) -> int:
        """Rows of w per warp of fast_matmul_bands.py."""
        return self.rows // self.warps


LOW_BANDS = DotShape(stages=1, width=4)
TALL_BANDS = DotShape(rows=128, stages=1, width=4)


@dataclass(frozen=True)
class GemvShape:
    """How the kernel without tensor cores is launched, for at most 4 rows of activations.

    Attributes:
        turns: rows of w per warp; turns * warps divides 64.
        groups: groups of 16 columns at a time, a multiple of 32.
        stages: 1 to load from memory to registers, more to load ahead into shared memory.
        warps: per program.
        parts: parts of the columns.
    """

    turns: int = 4
    groups: int = 32
    stages: int = 1
    warps: int = 4
    parts: int = 1


@dataclass(frozen=True)
class Choice:
    """A line of the table.

    Attributes:
        up_to: rows of activations; a GemvShape takes 4 at most, LOW_BANDS 16, TALL_BANDS 256, others 64.
        shape: how the kernel is launched; its number of parts is replaced.
        programs: with fewer programs the columns are cut in 2, 4 or 8 parts, 2 at most for a GemvShape. Few programs
            leave multiprocessors idle; parts cost a second kernel, which adds their sums.
        from_rows: for matrices of at least so many rows.
        measured: whether it was the fastest of those compared on this device, for some matrix of so many rows.
    """

    up_to: int
    shape: DotShape | GemvShape
    programs: int
    from_rows: int = 0
    measured: bool = False


@dataclass(frozen=True)
class FastProduct:
    """The table of one kind of device; the first line that fits counts. Where none fits: decode, then GEMM."""

    choices: tuple[Choice, ...] = (
        Choice(4, GemvShape(), programs=330),
        Choice(32, DotShape(), programs=384),
        Choice(64, DotShape(), programs=256),
    )

    def choice(self, rows: int, num_x: int) -> Choice | None:
        """Return the line for `num_x` rows of activations and a matrix of `rows` rows, or None."""
        fitting = (c for c in self.choices if num_x <= c.up_to and rows >= c.from_rows)
        return next(fitting, None)

    def max_rows(self, rows: int) -> int:
        """Return the largest number of rows of activations that a matrix of `rows` rows is multiplied by so."""
        return max((c.up_to for c in self.choices if rows >= c.from_rows), default=0)

    def launch_shape(self, rows: int, cols: int, num_x: int) -> DotShape | GemvShape:
        """Return how to launch the kernel that multiplies `num_x` rows by a matrix [rows, cols].

        Each part has columns, and so the sums of all parts take no more memory than the matrix in BF16.

        Raises:
            ValueError: no line fits; `num_x` is more than `max_rows(rows)`.
        """
        choice = self.choice(rows, num_x)
        if choice is None:
            raise ValueError(
                f"{num_x} rows of activations, a matrix of {rows} rows: no product is chosen"
            )
        shape = choice.shape
        if isinstance(shape, GemvShape):
            steps, per_program, most = (
                -(-cols // (shape.groups * fast_layout.GROUP)),
                shape.turns * shape.warps,
                2,
            )
        else:
            if cols % shape.cols:
                warps = 1 if shape.stages == 1 else shape.warps
                shape = replace(shape, cols=fast_layout.TILE_COLS, warps=warps)
            # A part's sums for a row, padded, take as much memory as BF16 weights of twice as many columns.
            room = cols // (2 << (num_x - 1).bit_length())
            most = 1 if shape.in_order else min(MAX_PARTS, room)
            steps, per_program = cols // shape.cols, shape.rows
        programs, parts = -(-rows // per_program) * -(-num_x // MAX_AT_ONCE), 1
        while 2 * parts <= min(most, steps) and programs * parts < choice.programs:
            parts *= 2
        return replace(shape, parts=parts)

    def max_rows_in_order(self, rows: int) -> int:
        """Return up to how many rows of activations a matrix of `rows` rows is multiplied so in order."""
        most = self.max_rows(rows)
        return most if _fill_device(TALL_BANDS, rows) else min(most, MAX_AHEAD_ROWS)

    def in_order_shape(
        self, rows: int, cols: int, num_x: int, is_compiled: bool, most_warps: int = 2
    ) -> DotShape:
        """Return how to launch the kernel that adds in order, for up to `max_rows_in_order(rows)` rows of activations.

        The columns are not cut. If the matrix has enough rows the kernel has bands; else it loads ahead into registers,
        in programs of at most `most_warps` warps.
        """
        if not is_compiled and num_x <= MAX_DOT_ROWS:
            return DotShape(
                in_order=True
            )  # no tensor cores, and so no columns that these put elsewhere
        bands = LOW_BANDS if num_x <= MAX_LOW_ROWS else TALL_BANDS
        if num_x > MAX_AHEAD_ROWS or _fill_device(bands, rows):
            return replace(bands, in_order=True)
        return _in_order_ahead(rows, cols, most_warps)


def _fill_device(bands: DotShape, rows: int) -> bool:
    """Return whether a matrix of `rows` rows has enough of these bands for all multiprocessors, uncut."""
    return -(-rows // bands.rows) * bands.rows >= IN_ORDER_ROWS


def _in_order_ahead(rows: int, cols: int, most_warps: int) -> DotShape:
    """Return how to launch the kernel that adds in order and loads ahead: the fewer rows, the more warps for each."""
    of_a_program = 8 if -(-rows // 8) * 2 <= IN_ORDER_WARPS else 16
    is_odd = cols % (2 * fast_layout.TILE_COLS) != 0
    warps = 1 if is_odd else min(2, most_warps)
    at_once = warps * fast_layout.TILE_COLS
    return DotShape(of_a_program, at_once, stages=1, warps=warps, width=4, in_order=True)
