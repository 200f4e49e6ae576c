"""How functions are compiled; every option in one place.

``error_model="numpy"`` makes a division by zero give infinity or NaN, as arrays do. No fast-math
flag is set anywhere: the order of sums is that of the source, and NaN and infinity are kept.
"""

from functools import cache
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering


class _OnBoundaries(Lower):
    """Lower to functions that keep vectors on their stack on boundaries of 64 bytes.

    LLVM notices too late that registers run out to begin a function's stack on more than 16 bytes,
    as its caller does. Then a vector that it puts there may lie across two cache lines and,
    depending on where the process's stack begins and how deep in it one is, across two pages. Loops
    took four times as long, in one process of ten (measured: 28 instead of 7 ms).
    """

    def setup_function(self, fndesc: Any) -> None:
        super().setup_function(fndesc)
        attributes = self.function.attributes
        attributes.alignstack = 64
        attributes.add("nounwind")  # llvmlite prints none if all there is has a number


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    _name = "lowering_on_boundaries"

    @property
    def lowering_class(self) -> Any:
        return _OnBoundaries


class _Compiler(Compiler):
    """Numba's own, but for that."""

    def define_pipelines(self) -> Any:
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.passes = [
                (_Lowering if step is NativeLowering else step, said)
                for step, said in pipeline.passes
            ]
        return pipelines


def _plainly_typed(dispatcher: Any) -> Any:
    """Have `dispatcher` take a constant integer as any other.

    Numba would compile the function anew for each one that it is called with, and a first call is
    long enough. LLVM sees the constants again where it inlines.
    """
    find: Any = getattr(dispatcher, "get_call_template", None)
    if find is not None:

        def find_plain(args: Any, kws: Any) -> Any:
            plain = (types.unliteral(a) if isinstance(a, types.IntegerLiteral) else a for a in args)
            return find(tuple(plain), kws)

        dispatcher.get_call_template = find_plain
    return dispatcher


def _inner(**options: Any) -> Any:
    """Compile what only kernels call: without the ways in from Python and from C."""
    compiler = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)
    return lambda python_function: _plainly_typed(compiler(python_function))


function = _inner(pipeline_class=_Compiler)
inline = _inner(pipeline_class=_Compiler, forceinline=True)  # for what is called once per vector
parallel_function = _inner(parallel=True)  # Numba's own compiler knows of `prange`


@cache
def _sources() -> tuple[tuple[str, int, int], ...]:
    """What the modules of this folder looked like when they were imported."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _cached(dispatcher: Any) -> Any:
    """Have `dispatcher` drop what it cached on disk when any module of this folder has changed.

    Numba compares only the file that a kernel is in, and would go on using old code of the
    functions that it calls. Where Numba has no such attribute, its own rule stays in force.
    """
    file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if file is not None and hasattr(file, "_source_stamp"):
        file._source_stamp = _sources()
    return dispatcher


def kernel(python_function: Any) -> Any:
    """Compile what Python calls."""
    options = {"error_model": "numpy", "cache": True, "nogil": True}
    return _cached(njit(pipeline_class=_Compiler, **options)(python_function))
