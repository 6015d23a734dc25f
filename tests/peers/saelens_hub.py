"""SAELens without a network: its own loaders and classes, with Hugging Face's files taken from a folder.

What is replaced is the transport, the sizes that SAELens hard-codes per repository name, and the table of
normalisation factors (`norm_scaling_factor`), which SAELens keeps beside its list of releases.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest


class SaeLens:
    """`load` gives an `sae_lens.SAE` of a folder's files, read by the named converter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sae_lens.loading.pretrained_sae_loaders as loaders
        import sae_lens.saes.sae as sae

        self.SAE = sae.SAE
        self.converters = loaders.NAMED_PRETRAINED_SAE_LOADERS
        self._folder = Path()
        self._overrides: dict[str, Any] = {}
        self._scale: float | None = None
        monkeypatch.setattr(loaders, "hf_hub_download", self._download)
        monkeypatch.setattr(
            loaders, "hf_hub_url", lambda repo_id, filename: self._download(repo_id, filename)
        )
        monkeypatch.setattr(loaders, "build_hf_headers", dict)
        monkeypatch.setattr(loaders, "_get_with_rate_limit_retry", _range)
        monkeypatch.setattr(sae, "get_config_overrides", lambda release, sae_id: dict(self._overrides))
        monkeypatch.setattr(sae, "get_norm_scaling_factor", lambda release, sae_id: self._scale)

    def load(
        self,
        folder: Path,
        name: str,
        converter: str,
        repository: str = "someone/something",
        scale: float | None = None,
        fold: bool = False,
        **overrides: Any,
    ) -> Any:
        """The SAE at `name` of `folder`, which plays the repository; `overrides` are for its config."""
        self._folder, self._overrides, self._scale = folder, overrides, scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.SAE.from_pretrained(
                repository, name, converter=self.converters[converter], fold_W_dec_norm=fold
            )

    def releases(self) -> dict[str, Any]:
        """What SAELens lists, by release."""
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        return get_pretrained_saes_directory()

    def _download(
        self,
        repo_id: str,
        filename: str,
        subfolder: str | None = None,
        force_download: bool = False,
        revision: str | None = None,
    ) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        file = self._folder / (subfolder or "") / filename
        if not file.is_file():
            raise LocalEntryNotFoundError(f"no {filename} in {repo_id}")
        return str(file)


class _range:
    """An answer to the range request that `url`, here a file, is asked for."""

    def __init__(self, url: str, headers: dict[str, Any]) -> None:
        start, stop = headers["Range"].removeprefix("bytes=").split("-")
        self.content = Path(url).read_bytes()[int(start) : int(stop) + 1]
