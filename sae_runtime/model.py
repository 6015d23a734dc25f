"""The language model: loaded without a head, truncated after the last layer that is needed.

Invariant: what a site yields is the tensor the module saw or produced in the model's own dtype, for
exactly the token ids given; right padding never changes a real token, because attention is causal
and the padding comes after it, so no attention mask is passed. Contexts that share a row do not see each
other (`packing.py`). The layers that are loaded give what they
give in the whole model. A checkpoint that holds more than text runs its text model alone.
Trade-off: a Q4 GGUF file is dequantised once into a cached float32 directory (0.5 GB for a
135M-parameter model) so that every worker maps it in about a second; reading the GGUF takes 3 to 12 s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from sae_runtime import hub
from sae_runtime.cache import cache_dir
from sae_runtime.errors import InputError, one_line
from sae_runtime.families import WRAPPERS, Tap, decoder_layers, family, resolve
from sae_runtime.fused import fuse
from sae_runtime.packing import PACKED
from sae_runtime.sites import Site

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """A model: where transformers loads it from and what identifies it. Of the hub it is at one commit."""

    uri: str  # as the spec has it
    path: str  # hub id or directory
    revision: str | None
    fingerprint: str  # commit of the hub, or digest of the directory's files


def locate(uri: str, revision: str | None = None) -> ModelSource:
    """Resolve a spec's `model.uri`: a hub id, a directory or a .gguf file.

    A .gguf file is converted once into the cache. Raises InputError when nothing is there.
    """
    path = Path(uri).expanduser()
    if uri.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"model.uri: no such file: {uri}")
        directory = _converted(path)
        return ModelSource(uri, str(directory), None, directory.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model.uri: no config.json in directory {uri}; is it a model's?")
        _check_weights(path)
        return ModelSource(uri, str(path), None, _digest_dir(path))
    if path.exists():
        raise InputError(f"model.uri: {uri} is neither a model's directory nor a .gguf file")
    if uri.startswith(("/", ".", "~")) or uri.count("/") > 1:
        raise InputError(f"model.uri: no such directory: {uri}")
    load_config(ModelSource(uri, uri, revision, ""))
    place = hub.Place(uri, revision, "")
    try:
        place = hub.commit(place)
    except hub.HubError as error:
        found = hub.cached_commit(place)  # which is what transformers has just read
        if found is None:
            raise InputError(_of_model(error)) from error
        place = found
    # Whoever loads it later, and wherever, is to load this commit, whatever has been pushed by then.
    return ModelSource(uri, place.repo, place.revision, str(place.revision))


def hub_files(source: ModelSource) -> list[hub.Place]:
    """Files of a model on the hub that loading it reads, its tokenizer's too; [] for one that is here.

    Weights are those that transformers would choose. InputError where the hub does not say, or has none.
    """
    if Path(source.path).is_dir():
        return []
    root = hub.commit(hub.Place(source.path, source.revision, ""))
    try:
        names = [name for name in hub.files(root) if "/" not in name]
        weights = _weights(root, names)
    except InputError as error:
        raise InputError(_of_model(error)) from error
    small = [n for n in names if n.endswith((".json", ".model", ".txt", ".jinja")) and n not in weights]
    return [replace(root, path=name) for name in sorted({*small, *weights})]


def _of_model(error: InputError) -> str:
    return str(error).replace("saes.uri: ", "model.uri: ", 1)


def _weights(root: hub.Place, names: Sequence[str]) -> list[str]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if whole in names:
            return [whole]
        if (index := f"{whole}.index.json") in names:
            with open(hub.download(replace(root, path=index)), encoding="utf-8") as stream:
                shards = {str(name) for name in json.load(stream)["weight_map"].values()}
            if shards <= set(names):
                return sorted({index, *shards})
    raise InputError(f"model.uri: {root.uri} has no weights (model.safetensors or pytorch_model.bin)")


def load_config(source: ModelSource) -> Any:
    """The model's transformers config. Raises InputError when it cannot be read."""
    from huggingface_hub import logging
    from transformers import AutoConfig

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # five lines about retries otherwise, where there is no network
    try:
        return AutoConfig.from_pretrained(source.path, revision=source.revision)
    except (OSError, ValueError) as error:
        where = "" if Path(source.path).is_dir() else "no such directory, and no model that the hub gives us"
        raise InputError(
            f"model.uri: {source.uri!r}: {where or 'unusable config'}: {one_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)


def text_config(source: ModelSource) -> Any:
    """The config of the part of the model that reads text: the model's own, or one nested in it.

    Raises InputError when it cannot be read.
    """
    return load_config(source).get_text_config(decoder=True)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's fast tokenizer. Raises InputError when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision)
    except (OSError, ValueError) as error:
        raise InputError(f"model.uri: no tokenizer in {source.uri!r}: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(f"model.uri: {source.uri!r} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def site_paths(source: ModelSource, sites: Sequence[Site]) -> dict[Site, tuple[str, int]]:
    """(public path, width) of each site, from the config alone; InputError for one that is not there."""
    from transformers import AutoModel

    config = _truncated(source, sites)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    prefix = _prefix(source)
    taps = [resolve(model, site, prefix) for site in sites]
    return {tap.site: (tap.path, tap.width) for tap in taps}


def model_size(source: ModelSource, sites: Sequence[Site]) -> tuple[int, float]:
    """(parameters of the model cut after `sites`, those of its layers that a token uses), from the config.

    A mixture's experts are used in the proportion that is chosen for a token.
    """
    from transformers import AutoModel

    config = _truncated(source, sites)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = config.num_experts_per_tok / experts if experts else 1.0
    used = sum(
        parameter.numel() * (share if ".experts." in name else 1.0)
        for name, parameter in decoder_layers(model).named_parameters()
    )
    return sum(parameter.numel() for parameter in model.parameters()), used


def on_this_machine(source: ModelSource) -> ModelSource:
    """`source` with a path that is here: another machine's converted GGUF file is converted here too."""
    if source.uri.endswith(".gguf") and not Path(source.path).is_dir():
        return locate(source.uri)
    return source


class LanguageModel:
    """A truncated model with taps on the sites that are needed.

    `run(ids)` takes token ids int64 [contexts, length] and yields, per site, what its tap captures:
    [contexts, length, width] in the model's dtype, on the model's device. `taps[site].finish` makes the
    site's activation of it. On a CPU several threads may run batches at once; `fused` is for measuring.
    Where `attention` packs (`packs`), `run(ids, positions)` takes rows in which contexts follow each other.
    """

    def __init__(
        self,
        source: ModelSource,
        sites: Sequence[Site],
        dtype: str = "bfloat16",
        device: str = "cpu",
        fused: bool = True,
        attention: str = "sdpa",
    ) -> None:
        """Load `source` up to the last layer of `sites`; InputError if a site is not there."""
        self.device = torch.device(device)
        self.packs = attention in PACKED
        self.module = _load(source, sites, DTYPES[dtype], _implementation(attention, self.device))
        self.module.to(self.device).eval()
        prefix = _prefix(source)
        self.taps: dict[Site, Tap] = {site: resolve(self.module, site, prefix) for site in sites}
        if fused:
            fuse(self.module, [tap.module for tap in self.taps.values()])
        self._capture = Capture(self.taps.values())
        self._source = source

    @torch.inference_mode()
    def run(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> dict[Site, torch.Tensor]:
        """Activations of every tapped site for `ids` [contexts, length], right padded; or for one packed row
        [1, length] with `positions` int64 of the same shape, which begin at 0 in each context."""
        assert positions is None or self.packs
        at = None if positions is None else positions.to(self.device)
        with self._capture.into() as activations:
            self.module(input_ids=ids.to(self.device), position_ids=at, use_cache=False)
        for site, tap in self.taps.items():
            if site not in activations:
                raise InputError(f"saes.site: the model does not run {tap.path}")
        return activations

    @torch.inference_mode()
    def check_packing(self, length: int) -> None:
        """Run rows [1, length] that begin with two contexts through the first layer's attention.

        InputError if the second one has other values, by a single bit, once the first one's tokens are
        others: transformers finds the contexts, each family in code of its own, and says nothing where it
        does not.
        """
        each = min(16, length // 2)
        positions = torch.zeros(1, length, dtype=torch.int64)
        positions[0, : 2 * each] = torch.arange(each).repeat(2)
        found: list[torch.Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0, each : 2 * each].clone())
            raise _Enough

        layer = decoder_layers(self.module)[0]
        handle = layer.get_submodule(family(self.module.config).attention).register_forward_hook(stop)
        try:
            for token in (1, 2):
                ids = torch.full((1, length), 3)
                ids[0, :each] = token
                with contextlib.suppress(_Enough):
                    self.run(ids, positions)
        finally:
            handle.remove()
        if not torch.equal(*found):
            raise InputError(
                f"model.attention: in this version of transformers packed contexts of {self._source.uri} see "
                "each other; use sdpa"
            )


class _Enough(Exception):
    """Ends a run of which no more is wanted."""


class Capture:
    """Hooks on a model that keep what its sites have, for each thread the runs of its own.

    Sites that share a module's side share one tensor.
    """

    def __init__(self, taps: Iterable[Tap]) -> None:
        self._here = threading.local()
        places: dict[tuple[nn.Module, str], list[Tap]] = {}
        for tap in taps:
            places.setdefault((tap.module, tap.side), []).append(tap)
        for (module, side), there in places.items():
            # `always_call` is not wanted: an error in the model must surface as itself.
            if side == "input":
                module.register_forward_pre_hook(partial(self._input, there), with_kwargs=True)
            else:
                module.register_forward_hook(partial(self._output, there))

    @contextlib.contextmanager
    def into(self) -> Iterator[dict[Site, torch.Tensor]]:
        """A dict that fills as this thread runs the model."""
        found: dict[Site, torch.Tensor] = {}
        self._here.found = found
        try:
            yield found
        finally:
            del self._here.found

    def _input(
        self, taps: Sequence[Tap], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._take(taps, args[0] if args else kwargs["hidden_states"])  # families differ in calling attention

    def _output(self, taps: Sequence[Tap], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Attention gives a tuple, as do some mixtures of experts, and decoder layers before transformers 5.
        self._take(taps, output[0] if isinstance(output, tuple) else output)

    def _take(self, taps: Sequence[Tap], seen: torch.Tensor) -> None:
        if hasattr(self._here, "found"):
            self._here.found.update((tap.site, tap.take(seen)) for tap in taps)


def _prefix(source: ModelSource) -> str | None:
    """Where `AutoModelForCausalLM` has the text model, of a checkpoint that holds more than that."""
    return WRAPPERS.get(load_config(source).model_type)


def _truncated(source: ModelSource, sites: Sequence[Site]) -> Any:
    """The text model's config cut after the last layer that `sites` need. InputError for an unknown type."""
    whole = load_config(source)
    config = text_config(source) if whole.model_type in WRAPPERS else whole
    family(config)
    have, need = int(config.num_hidden_layers), max(site.layer for site in sites) + 1
    if need > have:
        raise InputError(f"saes: layer {need - 1} does not exist in the model, which has {have} layers")
    config.num_hidden_layers = need
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:need]
    return config


def _implementation(attention: str, device: torch.device) -> str | None:
    """transformers' name for `model.attention`; None leaves it the choice, which is eager where a model has
    no sdpa."""
    if attention == "sdpa":
        return None
    return "eager" if attention == "flex_attention" and device.type == "cpu" else attention


def load_with_head(source: ModelSource, sites: Sequence[Site]) -> Any:
    """The text model with its unembedding, of the layers that `sites` need, on the CPU in the dtype of its
    files: for its weights. Raises InputError as loading it does."""
    return _load(source, sites, "auto", None, head=True)


def _load(
    source: ModelSource,
    sites: Sequence[Site],
    dtype: torch.dtype | str,
    attention: str | None,
    head: bool = False,
) -> Any:
    """A text model (no other modality; without `head` a bare one) of the layers that `sites` need."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    config = _truncated(source, sites)
    # The keys of a wrapped text model, in the hub's older files and in newer ones.
    nested = None
    if _prefix(source):
        body = "model." if head else ""
        nested = {
            r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
            r"^(?:model\.)?language_model\.(?!lm_head\.)(?:model\.)?": body,
        }
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the layers left out are reported as unexpected weights
    logging.disable_progress_bar()
    try:
        kind: Any = AutoModelForCausalLM if head else AutoModel
        model, report = kind.from_pretrained(
            source.path,
            revision=source.revision,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            key_mapping=nested,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model.uri: cannot load {source.uri!r}: {one_line(error)}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    if report["missing_keys"]:  # transformers would make them up at random
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"model.uri: {source.uri!r} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}"
        )
    model.config.pad_token_id = None  # GPT-2 else warns of the padding, which needs no mask here
    return model


def _converted(gguf: Path) -> Path:
    """The cached directory of a GGUF file: dequantised to float32, with its tokenizer."""
    target = cache_dir() / "models" / f"gguf-{_digest_files([gguf])}"
    if (target / "config.json").is_file():
        return target
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise InputError(
            "model.uri: reading .gguf needs two more packages: pip install 'corpuscope[gguf]'"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):  # a machine's workers want it at the same time
        if not (target / "config.json").is_file():
            _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = Path(tempfile.mkdtemp(prefix=".gguf-", dir=target.parent))
    try:
        folder, name = str(gguf.parent), gguf.name
        with gguf.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError("it does not begin as a GGUF file does")
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(partial)
        os.rename(partial, target)
    except Exception as error:  # its readers have errors of many kinds for a damaged file
        raise InputError(f"model.uri: cannot read {gguf}: {one_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_weights(path: Path) -> None:
    """InputError unless the directory holds weights and the headers of its safetensors files are whole."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors"))
    if not files and not any(path.glob("*.bin")):
        raise InputError(f"model.uri: no weights (*.safetensors or *.bin) in directory {path}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"model.uri: cannot read {file}: {one_line(error)}") from error


def _digest_dir(path: Path) -> str:
    suffixes = {".json", ".safetensors", ".bin", ".model"}
    return _digest_files(sorted(f for f in path.iterdir() if f.suffix in suffixes))


def _digest_files(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        if len(files) > 1:  # a single file may be renamed and is still the same model
            digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
