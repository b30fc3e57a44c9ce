"""Triton's interpreter, which runs the kernels here, whatever its version and NumPy's."""

from bench_setup import let_interpreter_count

let_interpreter_count()
