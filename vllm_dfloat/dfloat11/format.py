"""The numbers of the official DFloat11 format, and of what its decoders on CPUs and GPUs share. Imports nothing.

The stream is cut into blocks, one for each thread block of the official kernel, and a block into windows, one for each
thread. `luts` are up to 17 tables of 256 entries that hold a symbol or name a deeper table, and a row of code lengths.
"""

FIELDS = {  # tensor of a unit -> (dtype, dimensions)
    "encoded_exponent": ("U8", 1),
    "sign_mantissa": ("U8", 1),
    "luts": ("U8", 2),
    "output_positions": ("U8", 1),
    "gaps": ("U8", 1),
    "split_positions": ("I64", 1),
}
MAX_WEIGHTS = (1 << 32) - 1  # of a unit: positions have 32 bits
MAX_STREAM_BYTES = (1 << 31) - 1

BLOCK_BYTES = 4096
WINDOW_BYTES = 8
BLOCK_WINDOWS = BLOCK_BYTES // WINDOW_BYTES
BLOCK_BITS, WINDOW_BITS = 8 * BLOCK_BYTES, 8 * WINDOW_BYTES
GAP_BITS = 5  # bit of a window at which its first code starts
BLOCK_GAP_BYTES = BLOCK_WINDOWS * GAP_BITS // 8

MAX_CODE_BITS = 32
MAX_BLOCK_WEIGHTS = BLOCK_BITS  # a code has at least one bit
MIN_BLOCK_WEIGHTS = BLOCK_BITS // MAX_CODE_BITS - 1  # in any block but the last one
MAX_ROWS = 18  # of `luts`: root, 16 children, lengths
MAX_DEPTH = 3  # of a table below the root
FIRST_POINTER = 240  # entry values from here on name a table: 255 is row 1, 240 is row 16

# An entry of the decode tables (tables.py): 0 (no code), `symbol | length << LENGTH_SHIFT`, or `POINTER | row`.
LENGTH_SHIFT = 8
LENGTH_MASK = 0x3F
POINTER = 1 << 15

# Status of a block that was decoded: 0, or a sum of these bits.
STATUS_OK = 0
STATUS_BAD_CODE = 1  # bits that are no code, or a code beyond the end of the stream
STATUS_COUNT = 2  # the number of codes differs from output_positions
STATUS_GAP = 4  # a window does not end where the next one starts
