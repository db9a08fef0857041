"""A stand-in for a card, for machines without one: commands and tests run on it as they are.

    python -m tests.device.card icm train --device cuda     any command of the project; counts are printed at the end
    python -m tests.device.card --as mps icm eval --device mps
    python -m pytest -p tests.device.as_cuda tests/device   the tests that need it, as `make test` runs them

Its tensors say `cuda:0` (or `mps:0`) and live in the memory of the CPU. Autograd, autocast, optimisers and threads work
as on a card. It refuses what a card refuses: tensors of two devices in one operator, a generator of the CPU for numbers
drawn on the card, indices on the card for a tensor on the CPU, `.numpy()` and buffers of its tensors, pickling them. As
"mps" it has no float64 either. It counts (`tests.device.counts`). It says nothing about speed, memory or the kernels of
a card.

`install` comes before anything imports torch, for torch asks only once what devices there are. So tests that use the
stand-in need a process of their own. It is written against the internals of torch; where these are others, or where
there is no g++, it raises `NoStandIn`.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Sequence

from tests.device.counts import counting
from tests.device.hooks import NoStandIn, load_hooks

_installed: list[str] = []
_LETTING_GO = 0.1  # seconds; a few milliseconds are enough


def installed() -> str | None:
    """Return the kind of device that is stood in for in this process, "cuda" or "mps", or None."""
    return _installed[0] if _installed else None


def install(kind: str = "cuda") -> None:
    """Make a card from here on, in this process and in threads that start later.

    Raises:
        NoStandIn: it cannot be had with this torch or on this machine.
    """
    hooks = load_hooks(kind)
    try:
        from tests.device.torch_changes import change_torch, try_it

        hooks.register_guard()
        change_torch(kind)
        try_it(kind)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        raise NoStandIn(f"the installed torch has other internals: {type(error).__name__}: {error}") from error
    _installed.append(kind)
    # Tensors are Python objects here. A thread of autograd that still lets go of some when Python ends would abort it.
    atexit.register(time.sleep, _LETTING_GO)


def main(arguments: Sequence[str]) -> int:
    """Run one command of icm on the stand-in."""
    words = list(arguments)
    kind = words[1] if words[:1] == ["--as"] else "cuda"
    words = words[2:] if words[:1] == ["--as"] else words
    if words[:1] != ["icm"] or kind not in ("cuda", "mps"):
        print("usage: python -m tests.device.card [--as cuda|mps] icm COMMAND ...", file=sys.stderr)
        return 2
    try:
        install(kind)
    except NoStandIn as error:
        print(f"error: there is no stand-in card here: {error}", file=sys.stderr)
        return 1
    from icm_cli.app import run

    with counting() as counts:
        code = run(words[1:])
    print(f"on the stand-in for {kind}: {counts}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
