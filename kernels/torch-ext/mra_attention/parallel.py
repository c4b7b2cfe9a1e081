"""Work on torch's own threads, in one parallel region.

Threads of a region wait for one another at its end. An operator of torch is a region of its own, so
that a pass of a hundred operators has a hundred ends; on a machine whose cores are busy with other
programs each of them costs a time slice. Within a region operators of torch run on one thread.
"""

import ctypes
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import _ctypes

_Body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@functools.cache
def torch_parallel_for() -> "_ctypes.CFuncPtr | None":
    """`torch_parallel_for(begin, end, grain, body, context)` of torch's C interface, in torch from
    2.10 on; None where there is none.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    function.argtypes = (*3 * [ctypes.c_int64], _Body, ctypes.c_void_p)
    return function


def _region(count: int) -> "_ctypes.CFuncPtr | None":
    """What opens a region, if there are threads and enough items for them."""
    return torch_parallel_for() if 1 < torch.get_num_threads() <= count else None


def run_items(work: Callable[[int], None], count: int) -> None:
    """Call `work(i)` for every i below `count`, without gradients: on torch's threads where there
    are as many items as threads, else in turn, and operators use the threads. A compiler sees the
    items in turn.

    `work` must not depend on the order of items. What it raises is raised here.
    """
    region = None if torch.compiler.is_compiling() else _region(count)
    if region is None:
        for item in range(count):
            work(item)
        return
    items = itertools.count()
    errors: list[BaseException] = []
    # A thread of torch has neither mode of the caller.
    in_inference_mode = torch.is_inference_mode_enabled()

    def body(begin: int, end: int, context: int | None) -> None:
        try:
            with torch.inference_mode() if in_inference_mode else torch.no_grad():
                while not errors and (item := next(items)) < count:
                    work(item)
        except BaseException as error:  # has no way out of a callback of C
            errors.append(error)

    region(0, torch.get_num_threads(), 1, _Body(body), None)
    if errors:
        raise errors[0]
