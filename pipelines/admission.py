"""Which workers may scan: those whose device and versions give the values of the index.

Invariant: what a worker tells of itself is text by name, so that one of other code can be understood too;
a worker is judged before it gets its first unit, and again when its process was started anew. The first
model of device that scans an index is the index's; another is refused unless the spec allows mixtures.
Measured (2 busy cores of a Xeon): telling takes a worker 20 ms once torch is imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import socket
from collections.abc import Callable, Mapping

import torch

from pipelines import devices
from pipelines.storage import Store
from pipelines.version import code_version
from sae_runtime.device import device_model
from sae_runtime.errors import CorpuscopeError, InputError, one_line

Told = Mapping[str, str]
_DECIDE = ("corpuscope", "torch", "transformers", "numba")  # values follow from these
_HARMLESS = ("python", "numpy")  # a difference is named
_REMEDY = "`model.mixed_devices: true` in the spec allows several, at the price of bit-equal values"


def introduce(device: str) -> dict[str, str]:
    """What a worker tells of itself: `host`, `process`, versions, and `device` or the `error` that it has."""
    told = {"host": socket.gethostname(), "process": str(os.getpid()), **versions()}
    try:
        return told | {"device": device_model(device)}
    except (CorpuscopeError, RuntimeError) as error:  # torch has RuntimeErrors for what a driver lacks
        return told | {"error": one_line(error)}


@functools.cache
def versions() -> dict[str, str]:
    """Versions here of what decides values, and of what people ask for next."""
    installed = {name: importlib.metadata.version(name) for name in ("transformers", "numba", "numpy")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpuscope": code_version(),
        **installed,
    }


def check_here(store: Store, device: str, mixed: bool) -> None:
    """InputError if this machine's device is not the index's and mixtures are not allowed; writes nothing."""
    model = device_model(device)
    have = devices.recorded(store)
    if have and model != have[0] and not mixed:
        raise InputError(
            f"index {store.uri}: it was scanned on {have[0]}, and this is {model}, which may give other "
            f"values; {_REMEDY}; or scan into another index"
        )


class Admission:
    """Judges the workers of one scan; `notice` takes a line where a mixture begins or versions differ."""

    def __init__(self, store: Store, run: int, mixed: bool, notice: Callable[[str], None]) -> None:
        self._store, self._run, self._mixed, self._notice = store, run, mixed, notice
        self._models: tuple[str, ...] | None = None  # of the index; not read before a worker is there
        self._build = ""  # of torch, as the first worker has it
        self._said: set[str] = set()

    def refusal(self, told: Told) -> str | None:
        """Why a worker may not scan, in words that go on after its name; None if it may.

        One that may has its device recorded in the index. Raises what the store raises.
        """
        if "device" not in told:
            return f"it cannot work: {told.get('error', 'it does not say on which device it is')}"
        return self._other_versions(told) or self._other_device(told["device"])

    def _other_versions(self, told: Told) -> str | None:
        here = versions()
        for name in _DECIDE:
            # A head without a GPU may have another build of the same torch; workers among themselves may not.
            if _release(told.get(name, "none")) != _release(here[name]):
                return f"it has {name} {told.get(name, 'none')}, this driver {here[name]}; install the same"
        if (self._build or told["torch"]) != told["torch"]:
            return f"it has torch {told['torch']}, the first worker {self._build}; install the same"
        self._build = told["torch"]
        for name in _HARMLESS:
            if told.get(name) != here[name]:
                self._say(f"note: {told.get('host')} has {name} {told.get(name)}, this driver {here[name]}")
        return None

    def _other_device(self, model: str) -> str | None:
        if self._models is None or model not in self._models:
            self._models = devices.record(self._store, model, self._run, alone=not self._mixed)
        if model == self._models[0]:
            return None
        if not self._mixed:
            return f"its device is {model}, the index's {self._models[0]}; {_REMEDY}"
        self._say(
            f"warning: devices are mixed ({', '.join(self._models)}): values are not bit-equal to those of "
            "one; each unit's commit names its own"
        )
        return None

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._notice(line)


def _release(version: str) -> str:
    return version.split("+")[0]
