"""Train with several processes, each with an adapter of its own at every step. PyTorch's launcher starts them.

    torchrun --nproc-per-node 3 $(command -v icm) train

    rank 0   draw 0 ── gradient ─┐             ┌─▶ draw 3 ── gradient ─┐
    rank 1   draw 1 ── gradient ─┼─ mean, step ┼─▶ draw 4 ── gradient ─┼─ mean, step ─▶ ...
    rank 2   draw 2 ── gradient ─┘             └─▶ draw 5 ── gradient ─┘

Rank 0 does everything else alone: it holds the job lock, saves checkpoints, publishes and prints. The others get the
network from it, read the adapters that they draw, and leave when the training is over. Progress counts draws, so a
stopped run can be resumed by another number of processes.

Before every exchange the ranks agree that nobody has stopped. So Ctrl-C and a failure on one rank stop all of them
before the same step. A rank that is killed breaks the connection, which the others notice at once.
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

_TIMEOUT = timedelta(minutes=10)  # for one exchange: far more than a step takes, and than saving a checkpoint
_POLL_SECONDS = 0.1
_FINE, _STOPPED, _FAILED = range(3)
_AGAIN = "run the same command to continue"
_PARTS = 8  # most byte strings in one `share`


def launched() -> tuple[int, int]:
    """Return rank and number of processes as the launcher says in the environment; (0, 1) without a launcher."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Ranks:
    """The processes that train together, as one of them sees them; by default one process alone."""

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._turn = 0
        self._is_over = count == 1

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Turn a device name into the device of this process: on CUDA, each process of a machine has its own card.

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
        """Return what rank 0 gives: any number of byte strings up to 8, none of them empty.

        Args:
            parts: On rank 0, what all ranks get.
            on_wait: On the others, called ten times a second until rank 0 is there, which may take hours.

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
            data = torch.empty(sum(sizes), dtype=torch.uint8)
            if self.is_first:
                data = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
            dist.broadcast(data, 0)
        whole = data.numpy().tobytes()
        return [whole[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]

    def average(
        self, parameters: Iterable[torch.nn.Parameter], measured: torch.Tensor, *, draws: int, left: int
    ) -> tuple[int, torch.Tensor]:
        """Replace every gradient by its mean over the draws of all ranks.

        Args:
            parameters: The same ones on every rank, in the same order. A parameter without a gradient on some ranks
                has a gradient of zero there; one without a gradient on any rank stays without.
            measured: Numbers to average too, shape (m,).
            draws: How many draws each rank sees in a step.
            left: How many draws are left; what a rank sees beyond that counts for nothing.

        Returns:
            How many draws the mean is of, and the means of `measured`.

        Raises:
            OtherProcessFailed: Another rank failed. The gradients are of no use then.
            Cancelled: Another rank was stopped; likewise.
        """
        if self.count == 1:
            return min(draws, left), measured
        import torch
        import torch.distributed as dist

        self._agree()
        done = min(self.count * draws, left)
        own = min(max(left - self.rank * draws, 0), draws)  # of these, this rank saw so many
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
        """Tell the others why this rank stops, unless they know."""
        if self._is_over or not isinstance(error, Exception):  # a second Ctrl-C waits for nobody
            return
        assert self._store is not None
        with suppress(IcmLoraError, RuntimeError):
            if not isinstance(error, Cancelled):
                self._store.set(f"failure/{self.rank}", str(error) or type(error).__name__)
            if self.is_first:
                self._meet()
            self._agree(_STOPPED if isinstance(error, Cancelled) else _FAILED)

    def _meet(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait for rank 0 without a limit of time; what comes after has one."""
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
        """Tell all ranks how this one is; raise if any of them stops."""
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
        """Turn a broken connection, or one that nothing came from in time, into `OtherProcessFailed`."""
        try:
            yield
        except RuntimeError as error:  # all that torch.distributed raises
            self._is_over = True
            raise OtherProcessFailed("another process of this training run was killed or hangs", hint=_AGAIN) from error


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes of the launcher for the block, if there is one; raise `OtherProcessFailed` if they fail."""
    rank, count = launched()
    if count == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # imported in the block, as optimizers do, it would keep the group for good
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
