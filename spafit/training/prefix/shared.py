"""Hidden states after the frozen layers that several runs of one process share.

With group 1 frozen and without dropout its output for an example is a constant, whatever the batch,
seed, learning rate or method above. So runs need not be in the same batch at the same time to share
it: the first that needs an example computes it, and the others, trained after it, read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spafit.errors import ConfigError
from spafit.text.tokenization import Encodings
from spafit.training.prefix.cache import PrefixCache, PrefixKey, digest_of


class SharedPrefix:
    """The output of group 1 that runs share, in memory; given to :func:`spafit.fit` for each.

    A run computes what no earlier one has, and reads the rest. The key is all that the states
    depend on, so runs may differ in anything: what does not fit is not read. Each run ends bit for
    bit as it does by itself with ``cache_prefix="memory"``. The memory is freed with this object.
    """

    def __init__(self) -> None:
        # By the name of the data and the digest; the least recently used come first.
        self._caches: dict[tuple[str, str], PrefixCache] = {}
        self._in_use: set[tuple[str, str]] = set()

    @contextmanager
    def opened(
        self, name: str, encodings: Encodings, key: PrefixKey, limit_bytes: int
    ) -> Iterator[PrefixCache]:
        """Yield the cache in memory of some examples to one run.

        Parameters
        ----------
        name : str
            What the examples are in the run, such as "train".
        encodings : Encodings
            The examples.
        key : PrefixKey
            What their states depend on.
        limit_bytes : int
            The most bytes for these examples; states that no run uses at the moment are dropped
            where a new cache would exceed it together with them.

        Raises
        ------
        ConfigError
            If the examples do not fit in the limit, or another run uses their states now.
        """
        place = name, digest_of(encodings, key)
        if place in self._in_use:
            raise ConfigError(
                "another run reads these shared hidden states at the moment; runs share them one "
                "after the other"
            )
        new = PrefixCache(encodings, key, folder=None, limit_bytes=limit_bytes)
        if place not in self._caches:
            self._make_room(limit_bytes - new.nbytes)
        cache = self._caches[place] = self._caches.pop(place, new)  # now the most recently used
        self._in_use.add(place)
        try:
            yield cache
        finally:
            self._in_use.remove(place)
            cache.forget_aside()

    def _make_room(self, limit_bytes: int) -> None:
        """Drop what was used least recently until the rest fits, but nothing that is in use."""
        held = sum(cache.nbytes for cache in self._caches.values())
        for place in [each for each in self._caches if each not in self._in_use]:
            if held > limit_bytes:
                held -= self._caches.pop(place).nbytes
