"""Train with several processes, each with its own adapter at every step. PyTorch's launcher starts them.

    torchrun --nproc-per-node 3 $(command -v icm) train

    rank 0   draw 0 ── gradient ─┐             ┌─▶ draw 3 ── gradient ─┐
    rank 1   draw 1 ── gradient ─┼─ mean, step ┼─▶ draw 4 ── gradient ─┼─ mean, step ─▶ ...
    rank 2   draw 2 ── gradient ─┘             └─▶ draw 5 ── gradient ─┘

Rank 0 does everything else alone: it holds the job lock, saves checkpoints, publishes and prints. The others get the
network from it, read the adapters that they draw, and leave when training is over. Progress counts draws, so a stopped
run can be resumed by a different number of processes.

Before every exchange the ranks check that none has stopped, so Ctrl-C or a failure on one rank stops all of them before
the same step. A killed rank breaks the connection, and the others notice at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from icmlora.errors import Cancelled, DeviceUnavailable, IcmLoraError, OtherProcessFailed

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

_TIMEOUT = timedelta(minutes=10)  # for one exchange: far longer than a step, or saving a checkpoint
_POLL_SECONDS = 0.1
_FINE, _STOPPED, _FAILED = range(3)
_AGAIN = "run the same command to continue"
_PARTS = 8  # most byte strings in one `share`


def launched() -> tuple[int, int]:
    """Return rank and number of processes from the launcher's environment; (0, 1) without a launcher."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Ranks:
    """The processes that train together, from the view of one of them; by default a single process."""

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._turn = 0
        self._is_over = count == 1

    @property
    def is_first(self) -> bool:
        """Whether this process does the work that must be done only once."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return this process's device for a name; on CUDA, each process of a machine has its own card.

        Raises:
            DeviceUnavailable: There is no such device, or fewer cards than processes.
        """
        import torch

        from icmlora.io.devices import resolve_device

        device = resolve_device(name)
        if self.count == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            fact = f"device {name!r} is a single GPU, but each of the {self.count} processes needs its own"
            raise DeviceUnavailable(fact, hint="use --device cuda")
        device = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}")
        torch.cuda.set_device(device)
        return device

    def share(self, parts: Sequence[bytes] = (), *, on_wait: Callable[[], None] = lambda: None) -> list[bytes]:
        """Return rank 0's byte strings: at most 8, none of them empty.

        Args:
            parts: On rank 0, the byte strings for all ranks.
            on_wait: On the others, called ten times a second until rank 0 arrives, which may take hours.

        Raises:
            OtherProcessFailed: Another rank failed.
            Cancelled: Another rank was stopped.
        """
        if self.count == 1:
            return list(parts)
        import torch
        import torch.distributed as dist

        self._meet(on_wait)
        self._agree()
        lengths = torch.zeros(_PARTS, dtype=torch.int64)
        lengths[: len(parts)] = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        with self._noticing():
            dist.broadcast(lengths, 0)
        sizes = [int(size) for size in lengths if size]
        if not sizes:
            return []
        if self.is_first:
            data = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        else:
            data = torch.empty(sum(sizes), dtype=torch.uint8)
        with self._noticing():
            dist.broadcast(data, 0)
        whole = data.numpy().tobytes()
        return [whole[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]

    def average(
        self, parameters: Iterable[torch.nn.Parameter], measured: torch.Tensor, *, draws: int, left: int
    ) -> tuple[int, torch.Tensor]:
        """Replace every gradient by its mean over the draws of all ranks.

        Args:
            parameters: The same on every rank, in the same order. A gradient that is missing on some ranks counts as
                zero there; one that is missing on all ranks stays missing.
            measured: Numbers to average too, shape (m,).
            draws: Number of draws that each rank sees in a step.
            left: Number of draws left; further draws are ignored.

        Returns:
            Number of draws averaged over, and the means of `measured`.

        Raises:
            OtherProcessFailed: Another rank failed. The gradients are then invalid.
            Cancelled: Another rank was stopped; likewise.
        """
        if self.count == 1:
            return min(draws, left), measured
        import torch
        import torch.distributed as dist

        self._agree()
        done = min(self.count * draws, left)
        own = min(max(left - self.rank * draws, 0), draws)  # this rank's share of them
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = [parameter.grad if own else None for parameter in trained]
        pieces = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(trained, gradients, strict=True)
        ]
        present = measured.new_tensor([float(gradient is not None) for gradient in gradients])
        # One exchange for all: the network is small, so its gradients fit in memory twice.
        flat = torch.cat([*(piece.flatten() for piece in pieces), measured, present]) * own
        with self._noticing():
            dist.all_reduce(flat)
        sizes = [*(piece.numel() for piece in pieces), len(measured), len(present)]
        *means, measured, present = torch.split(flat / done, sizes)
        for parameter, mean, is_present in zip(trained, means, present.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter) if is_present else None
        return done, measured

    def leave(self, error: BaseException) -> None:
        """Report to the other ranks why this one stops, unless they know."""
        if self._is_over or not isinstance(error, Exception):  # a second Ctrl-C does not wait
            return
        assert self._store is not None
        with suppress(IcmLoraError, RuntimeError):
            if not isinstance(error, Cancelled):
                self._store.set(f"failure/{self.rank}", str(error) or type(error).__name__)
            if self.is_first:
                self._meet()
            self._agree(_STOPPED if isinstance(error, Cancelled) else _FAILED)

    def _meet(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait for rank 0 without a timeout; the exchanges that follow have one."""
        assert self._store is not None
        self._turn += 1
        with self._noticing():
            if self.is_first:
                self._store.set(f"turn/{self._turn}", "")
                return
            while not self._store.check([f"turn/{self._turn}"]):
                on_wait()
                time.sleep(_POLL_SECONDS)

    def _agree(self, own: int = _FINE) -> None:
        """Report this rank's state to all ranks; raise if any of them stops."""
        import torch
        import torch.distributed as dist

        assert self._store is not None
        states = torch.zeros(self.count, dtype=torch.int64)
        states[self.rank] = own
        with self._noticing():
            dist.all_reduce(states)
            if not states.any():
                return
            self._is_over = True
            if (states == _FAILED).any():
                rank = states.tolist().index(_FAILED)
                reason = self._store.get(f"failure/{rank}").decode()
                raise OtherProcessFailed(f"process {rank} of {self.count} failed: {reason}", hint=_AGAIN)
            raise Cancelled

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Turn a broken connection or a timeout into `OtherProcessFailed`."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed raises this class, and subclasses of it
            import torch

            if isinstance(error, torch.OutOfMemoryError):  # of this process: `leave` informs the others
                raise
            self._is_over = True
            raise OtherProcessFailed("another process of this training run was killed or hangs", hint=_AGAIN) from error


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the launcher's processes, if any, for the block; raise `OtherProcessFailed` if they fail."""
    rank, count = launched()
    if count == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # imported while the group exists, as optimisers do, it would keep it forever
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
        dist.init_process_group(
            backend, store=PrefixStore("gradients", store), rank=rank, world_size=count, timeout=_TIMEOUT
        )
    except RuntimeError as error:
        raise OtherProcessFailed(f"some of the {count} processes did not start: {error}") from error
    ranks = Ranks(rank, count, PrefixStore("icm", store))
    try:
        yield ranks
    except BaseException as error:
        ranks.leave(error)
        raise
    finally:
        dist.destroy_process_group()
