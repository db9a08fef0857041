"""LoRA on parameters instead of modules (`target_parameters`), such as one tensor with the weights of all experts.

PEFT writes one pair for all E experts of a parameter; icm splits it into one module per expert, and joins them again:

    A (E * r, in)    expert e has the rows e * r to (e + 1) * r
    B (out, E * r)   expert e has the columns e, e + E, e + 2 E ...

The file names the module M instead of the parameter. If one module has two parameters, `M.base_layer` is the first that
the model declares, and `M` the second. The assignment, and every rank, follows from the configuration if only one
reading fits the shapes.

Source: huggingface/peft, tuners/lora/layer.py (`ParamWrapper`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations

from icmlora.errors import AdapterRefused
from icmlora.formats.peft.config import AdapterConfig
from icmlora.formats.peft.names import FactorPair, SortedTensors
from registry.names import natural_key

_INNER = ".base_layer"
# Order of a module's parameters in all transformers models.
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "v1", "down_proj", "w2")
_MAX_EXPERTS = 1024
_MAX_MODULES = 50_000
_MAX_CANDIDATES = 8
_KIND = "fused-experts"


def resolve_parameters(config: AdapterConfig, targets: Sequence[str], tensors: SortedTensors) -> SortedTensors:
    """Assign pairs to parameters, and determine the number of experts of each.

    Args:
        config: The adapter's configuration.
        targets: The modules that it lists.
        tensors: The pairs under their names in the file.

    Raises:
        AdapterRefused: No reading fits, or more than one.
    """
    if not config.target_parameters:
        return tensors
    chains: defaultdict[str, list[FactorPair]] = defaultdict(list)
    for pair in tensors.pairs:
        chains[_root(pair.module)].append(pair)
    found = [pair for root, chain in chains.items() for pair in _resolved(config, targets, root, chain)]
    if sum(pair.experts for pair in found) > _MAX_MODULES:
        raise AdapterRefused("it has too many experts", kind=_KIND)
    return SortedTensors(tuple(sorted(found, key=lambda pair: natural_key(pair.module))), tensors.extras)


def _root(module: str) -> str:
    while module.endswith(_INNER):
        module = module.removesuffix(_INNER)
    return module


def _resolved(config: AdapterConfig, targets: Sequence[str], root: str, chain: list[FactorPair]) -> list[FactorPair]:
    """Return the pairs of one module of the base model, assigned to its parameters."""
    chain = sorted(chain, key=lambda pair: len(pair.module), reverse=True)  # in the order of declaration
    parameters = [name.rpartition(".") for name in config.target_parameters]
    named = dict.fromkeys(name for head, _, name in parameters if head and f".{root}".endswith(f".{head}"))
    anywhere = dict.fromkeys(name for head, _, name in parameters if not head)
    if len(chain) == 1 and not named and (not anywhere or _is_module(config, targets, chain[0])):
        return chain
    if [pair.module for pair in reversed(chain)] != [root + depth * _INNER for depth in range(len(chain))]:
        raise AdapterRefused(f"{root} has parameters that the file does not contain", kind=_KIND)
    readings = list(_readings(config, root, chain, [*named, *anywhere]))
    if not readings:
        raise AdapterRefused(f"{root}: no rank of the configuration fits its fused experts", kind=_KIND)
    meanings = {tuple((pair.experts, config.scale_of(pair.target)) for pair in reading) for reading in readings}
    if len(meanings) > 1:
        fact = f"{root}: the ranks of its fused experts cannot be determined from the names and shapes"
        raise AdapterRefused(fact, kind=_KIND)
    return readings[0]


def _is_module(config: AdapterConfig, targets: Sequence[str], pair: FactorPair) -> bool:
    listed = any(f".{pair.module}".endswith(f".{target}") for target in targets)
    return listed or pair.a.shape[0] == config.rank_of(pair.module)


def _readings(
    config: AdapterConfig, root: str, chain: Sequence[FactorPair], names: Sequence[str]
) -> Iterator[list[FactorPair]]:
    """Yield the assignments of pairs to parameters that fit every rank."""
    for chosen in permutations(list(names)[:_MAX_CANDIDATES], len(chain)):
        places = [_DECLARED.index(name) for name in chosen if name in _DECLARED]
        if places != sorted(places):
            continue
        reading = [_read_as(config, f"{root}.{name}", pair) for name, pair in zip(chosen, chain, strict=True)]
        counts = {pair.experts for pair in reading}
        # A two-dimensional parameter counts as one expert; the others have the experts of the module.
        if 0 not in counts and len(counts - {1}) <= 1:
            yield reading


def _read_as(config: AdapterConfig, parameter: str, pair: FactorPair) -> FactorPair:
    """Return a pair assigned to a parameter; `experts` is 0 if its rank does not fit."""
    experts, rest = divmod(pair.a.shape[0], config.rank_of(parameter))
    experts = 0 if rest or experts > _MAX_EXPERTS or len(pair.a.shape) != 2 else experts
    # The weight of a linear layer goes by the name of the layer.
    module = parameter.removesuffix(".weight") if experts == 1 else parameter
    return replace(pair, module=module, target=parameter, experts=experts)
