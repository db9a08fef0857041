"""Adapters <-> codes of one generator, and task vectors -> adapters.

    task vectors ──▶ condition ─┐
    adapter ──tokens──▶ latent ─┴──▶ prediction ──rounded difference──▶ integers ──▶ code        encode

    code ──▶ condition, latent ────▶ prediction ──+ integers──▶ tokens ──▶ adapter               decode
    task vectors ──▶ condition ────▶ prediction ──────────────▶ tokens ──▶ adapter               generate

An adapter is encoded by icmlora/generator/codec/encoding.py, which searches for the quantiser step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.codec.code import CodeHead, ParsedCode, generator_of
from icmlora.generator.codec.packing import KindIntegers, pack, unpack
from icmlora.generator.codec.quantizer import TokenQuantizer, norm_of
from icmlora.generator.files.container import ABSENT
from icmlora.generator.files.network_file import network_from_bytes
from icmlora.generator.initial_a.subspace import initial_subspace
from icmlora.generator.network.cvae import CVAE, VIEWS, TaskState, predicted_tokens
from icmlora.generator.network.tokens import Modules, assembled, detokenize, modules_of
from icmlora.generator.scales import STRENGTHS
from icmlora.io.threads import one_thread, side_by_side

_LARGE = 1 << 18  # bytes of a code above which a second thread saves more than it costs
_SUBSPACES = 4  # initial subspaces that are cached


_Used = TypeVar("_Used")


@dataclass(frozen=True, eq=False)
class OpenCode:
    """A code as integers."""

    head: CodeHead
    state: TaskState
    streams: Sequence[Iterator[KindIntegers]]  # kinds are read one after the other

    @cached_property
    def groups(self) -> tuple[KindIntegers, ...]:
        """The integers of all kinds; raise `CodeError` if they are damaged."""
        return tuple(chain.from_iterable(self.streams))


class Codec:
    """Decodes the codes of one generator, on the CPU in float32; `encoding` and `measured` write and check them."""

    # With a tolerance near 1, the code of a well-predicted adapter is condition and latent, without integers.

    def __init__(self, net: CVAE, digest: str) -> None:
        """Use a network that was read from a file; codes name it by the file's SHA-256, in hexadecimal."""
        self.net, self.digest = net.eval(), digest
        self.sensitivity = self.net.sensitivity
        self.quantizer = TokenQuantizer(self.net)
        # Drawing an initial A takes a third of the time of decoding. All codes tried for an adapter have the same one,
        # and tasks often share it: with equal ranks and modules, trained under one seed.
        self.config = config = self.net.config
        sensitivity = self.sensitivity  # not self, which the cache would keep alive
        self.subspace = lru_cache(_SUBSPACES)(lambda initial: initial_subspace(initial, config, sensitivity))

    @classmethod
    def of(cls, data: bytes) -> Codec:
        """Open a generator file of one version; raise `GeneratorError` if it is damaged or has other tables."""
        return cls(network_from_bytes(data), hashlib.sha256(data).hexdigest())

    def decode(self, code: bytes, device: torch.device | None = None) -> Adapter:
        """Decode one code to float32 factors on a device (by default the CPU).

        Integers are read on the CPU. Another device's arithmetic may differ in the last bit.
        """
        head, parts = self.each_kind(code, lambda modules: modules, device)
        places = [(int(kind), int(layer)) for kind, layer in np.argwhere(head.kept != ABSENT)]
        return assembled(parts, self.config, modules=places, task_type=head.task_type)

    def each_kind(
        self, code: bytes, use: Callable[[Modules], _Used], device: torch.device | None = None
    ) -> tuple[CodeHead, list[_Used]]:
        """Decode one code kind by kind, a large one in parallel; call a function with the modules of each kind.

        Returns the code's head, and the function's result for each kind. Modules without integers are left out.
        """
        opened = self.open(code)
        head, state = opened.head, opened.state

        def used(stream: Iterable[KindIntegers]) -> list[_Used]:
            found = []
            for group in stream:
                slots, norms = group.slots, group.norms
                layer, root = torch.from_numpy(slots.layer), norm_of(norms).sqrt()
                strengths = torch.exp2(_floats(head.strengths[slots.kind]) / STRENGTHS)  # of each layer's dW, (L,)
                a, b = self.quantizer.dequantise(
                    slots,
                    norms,
                    state,
                    head.step,
                    group.vectors,
                    factors=(1 / root, strengths[layer] / root),
                    device=device or torch.device("cpu"),
                )
                found.append(use(modules_of(slots.kind, layer, a, b, self.config, self.sensitivity)))
            return found

        with side_by_side(None if len(code) > _LARGE else 1) as each:
            return head, list(chain.from_iterable(each(used, opened.streams)))

    @torch.no_grad()
    @one_thread()
    def generate(
        self,
        vectors: Mapping[str, torch.Tensor],
        layout: Sequence[ModuleShape],
        *,
        task_type: str | None,
        seed: int | None = None,
    ) -> Adapter:
        """Make an adapter from task vectors (hidden,) alone, with z at the prior's mean or sampled with a seed."""
        modules = sorted((*self.config.place_of(shape), shape.rank) for shape in layout)
        condition = self.condition(vectors)
        mean, scale = self.net.latent_prior(condition)
        if seed is not None:
            mean = mean + scale * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        state = TaskState(condition, mean.round().clamp(-127, 127), self.subspace(None))
        tokens = predicted_tokens(self.net, state, modules)
        pairs = [(kind, layer) for kind, layer, _ in modules]
        return detokenize(tokens, self.config, self.sensitivity, modules=pairs, task_type=task_type)

    def open(self, code: bytes) -> OpenCode:
        """Read a code's integers without decoding them to weights."""
        digest = generator_of(code)
        if digest != self.digest:
            raise CodeError(f"the code belongs to generator {digest[:12]}, not {self.digest[:12]}")
        parsed = ParsedCode.from_bytes(code, self.config)
        head = parsed.head
        subspace = replace(self.subspace(head.initial), shifts=head.shifts, boosts=head.boosts)
        state = TaskState(_floats(head.condition), _floats(head.latent), subspace)
        return OpenCode(head, state, unpack(self.quantizer, head, subspace, parsed.words))

    def close(self, head: CodeHead, groups: Sequence[KindIntegers]) -> bytes:
        """Write a code from its head and its integers."""
        subspace = replace(self.subspace(head.initial), shifts=head.shifts)
        words = pack(self.quantizer, head, subspace, groups)
        return ParsedCode(self.digest, head, words).to_bytes(self.config)

    def condition(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embed task vectors (hidden,) as integers, (C,); raise `GeneratorError` if one has the wrong length."""
        size = self.config.condition_size
        wrong = [len(vectors[view]) for view in VIEWS if size and view in vectors and vectors[view].shape != (size,)]
        if wrong:
            raise GeneratorError(f"a task vector has {wrong[0]} values; the generator was trained on {size}")
        condition: torch.Tensor = self.net.condition(vectors)
        return condition.round()


def _floats(values: NDArray[np.int8]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
