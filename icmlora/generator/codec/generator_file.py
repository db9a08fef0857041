"""A generator file for decoding: one codec per version, opened on demand."""

from __future__ import annotations

from collections.abc import Sequence

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import CodeError, GeneratorError, NotCovered
from icmlora.generator.codec.code import generator_of
from icmlora.generator.codec.codec import Codec
from icmlora.generator.files.file import versions_of
from icmlora.generator.files.network_file import network_from_bytes
from icmlora.generator.files.version_delta import words_to_changed


class GeneratorFile:
    """The versions of one generator, oldest first; earlier ones decode the codes that were made under them."""

    # An opened codec stays in memory as long as this object does.

    def __init__(self, data: bytes) -> None:
        self._versions = versions_of(data)
        self._codecs: dict[int, Codec] = {}
        # Names of the versions in their codes; the last one is the SHA-256 of the file.
        self.digests = tuple(version.digest for version in self._versions)
        # All have the same base model.
        self.configs = tuple(version.config for version in self._versions)

    def codec(self, number: int) -> Codec:
        """Return the codec of a version, counted from 0; versions added later do not change it."""
        if number not in self._codecs:
            # A whole network first, then the differences that lead from it to this version.
            chain = [number]
            while (base := self._versions[chain[-1]].base) is not None:
                chain.append(base)
            net = network_from_bytes(self._versions[chain[-1]].content)
            for link in reversed(chain[:-1]):
                try:
                    changed = words_to_changed(self._versions[link].content, net.state_dict())
                    net.load_state_dict(changed)
                except CodeError as error:
                    raise GeneratorError("the delta of a version does not fit its network") from error
            self._codecs[number] = Codec(net, self.digests[number])
        return self._codecs[number]

    def codec_of(self, code: bytes) -> Codec:
        """Return the codec of the version that a code names; raise `CodeError` if there is no such version."""
        digest = generator_of(code)
        if digest not in self.digests:
            raise CodeError(f"the code belongs to generator {digest[:12]}, not {self.digests[-1][:12]}")
        return self.codec(self.digests.index(digest))

    def codec_for(self, layout: Sequence[ModuleShape]) -> Codec:
        """Return the codec of the newest version that covers an adapter; raise `NotCovered` if there is none."""
        covering = self.covering(layout)
        if not covering:
            fact = "the generator does not cover every module and rank of this adapter"
            raise NotCovered(fact, hint="run `icm train --update` to add a version that covers it")
        return self.codec(covering[-1])

    def covering(self, layout: Sequence[ModuleShape]) -> list[int]:
        """Return the numbers of the versions that have every module, layer and rank of an adapter, oldest first."""
        return [number for number, config in enumerate(self.configs) if config.covers(layout)]
