"""Find the base model that a label of an adapter means. Labels of the same model are joined, and each is reported.

label --known to the store?------------------------> that base model
      --known mirror? (icmlora.base_models.finding.mirrors)-> its original, or a copy of it that the store has
      --same files as a base model of the store?---> that base model
      `---------------------------------------------> a base model of its own
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from icmlora.base_models.finding.fingerprint import fingerprint_base, is_same_model
from icmlora.base_models.finding.labels import lookalikes
from icmlora.base_models.finding.locations import find_located
from icmlora.base_models.finding.lookup import FoundBase, read_config
from icmlora.base_models.finding.mirrors import original_of
from icmlora.errors import AdapterRefused, BaseModelNotFound, BaseModelUnsuited
from icmlora.fleet.context import Context, Event
from registry.manifests import BaseLabel, BaseRecord
from registry.names import UNKNOWN_BASE, escape

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class BaseJoined(Event):
    """A label was joined to a base model; `icm base alias --remove` undoes it."""

    label: str  # as the adapters name it
    base_model: str
    # `mirror`, from the table of known mirrors, or `fingerprint`, from equal files on this machine.
    reason: Literal["fingerprint", "mirror"]
    is_quantised: bool  # whether the label is a quantised copy: adapters were trained on slightly other weights


class KnownBases:
    """The base models of a store, and the labels that an ingest adds."""

    def __init__(self, context: Context, store: Store | None, *, dry_run: bool = False) -> None:
        self._context, self._store = context, None if dry_run else store
        self._bases = {} if store is None else {base.name: base for base in store.base_models()}
        self._names = {label: base.name for base in self._bases.values() for label in base.names}
        self._copies: dict[str, FoundBase | None] = {}
        self._fingerprints = {
            str(base.shape.get("stamp")): base.fingerprint
            for base in self._bases.values()
            if base.shape is not None and base.fingerprint is not None
        }
        self.joined: list[BaseJoined] = []
        self._before = set(self._names)

    def name_of(self, label: str) -> str:
        """Return the name of the base model that has a label."""
        return self._names.get(label, label)

    def lookalikes(self) -> list[list[str]]:
        """Return groups of base models with similar names, one of them new. They are never joined."""
        new = {self._names[label] for label in self._names.keys() - self._before}
        return [group for group in lookalikes(set(self._names.values()) - {UNKNOWN_BASE}) if not new.isdisjoint(group)]

    def join_labels(self, labels: Iterable[str]) -> None:
        """Join the labels that the store does not know yet and that mean a model that it knows, and report each."""
        for label in sorted(set(labels) - self._names.keys() - {UNKNOWN_BASE}):
            if label in self._names:  # the original of an earlier mirror
                continue
            found = self._mirrored(label) or self._with_same_files(label)
            self._names[label] = label if found is None else found.base_model
            if found is None:
                continue
            self._names.setdefault(found.base_model, found.base_model)
            if self._store is not None:
                self._store.update_base(found.base_model, partial(_with_label, found))
            self.joined.append(found)
            self._context.on_event(found)

    def _mirrored(self, label: str) -> BaseJoined | None:
        original, is_quantised = original_of(label)
        alike = [name for known, name in sorted(self._names.items()) if original_of(known).original == original]
        name = self._names.get(original, alike[0] if alike else original)
        return None if name == label else BaseJoined(label, name, "mirror", is_quantised)

    def _with_same_files(self, label: str) -> BaseJoined | None:
        found = self.copy_of(label)
        if found is None:
            return None
        for name in sorted(set(self._names.values()) - {UNKNOWN_BASE}):
            other = self.copy_of(name)
            if other is not None and is_same_model(found, other, self._fingerprint):
                return BaseJoined(label, name, "fingerprint", is_quantised=False)
        return None

    def _fingerprint(self, found: FoundBase) -> str:
        """Return a fingerprint as the store knows it, or read all weights, once."""
        stamp = found.stamp()
        if stamp not in self._fingerprints:
            self._context.progress(0, None, f"reading {found.label}")
            self._fingerprints[stamp] = fingerprint_base(found)
        return self._fingerprints[stamp]

    def check_gguf(self, label: str, architecture: str) -> None:
        """Check that an adapter of a GGUF file is for a base model, as far as this machine knows it.

        Raises:
            AdapterRefused: llama.cpp calls the base model's architecture otherwise than the adapter says.
        """
        from icmlora.formats.pairs.gguf_lora import GgufBase  # imports torch; few adapters are GGUF files

        found = self.copy_of(label)
        if found is None or not (found.is_gguf or found.has_config):
            return
        try:
            base = GgufBase.of_file(found.path) if found.is_gguf else GgufBase.of_config(read_config(found.path))
        except (BaseModelNotFound, BaseModelUnsuited):
            return
        if base.architecture != architecture:
            fact = f"it is for the architecture {escape(architecture, 40)!r}, and {label!r} is {base.architecture!r}"
            raise AdapterRefused(fact, kind="base-model", hint="specify its base model with --base-model")

    def copy_of(self, label: str) -> FoundBase | None:
        """Return the copy of a base model on this machine, if there is one."""
        name = self.name_of(label)
        if name not in self._copies:
            try:
                self._copies[name] = find_located((self._bases.get(name) or BaseRecord(name=name)).names)
            except BaseModelNotFound:
                self._copies[name] = None
        return self._copies[name]


def _with_label(joined: BaseJoined, base: BaseRecord) -> BaseRecord:
    """Return a base model with another label, which no task has yet."""
    if joined.label in base.names:
        return base
    return replace(base, labels=(*base.labels, BaseLabel(label=joined.label, reason=joined.reason)))
