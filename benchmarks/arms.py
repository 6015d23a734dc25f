"""The arms of `compare.py`, each in a process of its own: the same contexts, the same SAEs, the same batches.

    floor    transformers' forward pass of the truncated model and the dense encode products in bfloat16,
             keeping nothing
    scan     Corpuscope's inline scan: token rows, statistics, top and sampled contexts, files, commit
    script   what a careful engineer writes in an afternoon: hooks, float32 encode, torch.nonzero, Parquet
             by pyarrow's defaults, then DuckDB for statistics and the 20 top contexts of every feature
    delphi   `delphi.latents.LatentCache` (eai-delphi, unchanged) with its own JumpReLU encoder in the model's
             dtype, as it loads Gemma Scope; then its `save_splits`. No statistics, no top contexts.

Invariant: loading, compiling and one batch of warm-up are in nobody's time, tokenising in the scan's alone;
the first token of a context is run and not kept, by every arm. What an arm frees in one round the C library
may keep for the next, as it does from unit to unit of a scan. Peak memory is what Linux reports (VmHWM)
between the beginning and the end of the timed work; it holds model and SAEs, and not their loading.

    python benchmarks/arms.py ARM WORLD_FOLDER OUT_FOLDER

then takes commands on stdin, a line each, and answers each with a line of JSON: `warm`, `run`, `keys FILE`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from world import BenchSae, World

Answer = dict[str, Any]


class Arm(Protocol):
    """One way to do the work. `run` is what is timed; the rest is not."""

    def __init__(self, world: World) -> None: ...

    def run(self, part: str, folder: Path) -> Answer:
        """Do a part of the work, leaving files in `folder`; what the arm knows of it by itself."""

    def measure(self, folder: Path) -> Answer:
        """`rows`, `activation_bytes` and `bytes` of what the last run left."""

    def rows(self, folder: Path, sae: BenchSae) -> tuple[np.ndarray, np.ndarray]:
        """(feature * tokens + token int64, ascending; activation float32) of what the last run kept."""


class Scan:
    """Our scan, as `benchmarks/scan.py` runs it."""

    def __init__(self, world: World) -> None:
        from jobs.specfile import load_spec
        from pipelines.ledger import Ledger
        from pipelines.planning import plan_units, prepare
        from pipelines.storage import Store
        from pipelines.unit import Scanner, Setup

        self.world = world
        self.parts = {}
        for part in ("warm", "run"):
            loaded, text = load_spec(world.spec(part), f"{world.folder}/no-index")
            prepared = prepare(loaded, "cpu")
            planned, metadata = plan_units(prepared, Ledger(Store(loaded.index)), text, allow_removal=False)
            self.parts[part] = (prepared, planned)
        setup = Setup(loaded, prepared.source, "cpu", (prepared.saes,), metadata, loaded.index)
        self.scanner = Scanner(setup)
        self.scanner.load(0)
        found = [info.id for info in self.scanner.infos]
        if found != [sae.id for sae in world.saes]:
            raise AssertionError(f"{world.folder}: the scan has other SAEs than the other arms: {found}")

    def run(self, part: str, folder: Path) -> Answer:
        import scan

        _, planned = self.parts[part]
        self.commits = scan.scan(self.scanner, planned, len(planned.units), str(folder))
        return {"counted": sum(commit.tokens for commit in self.commits)}

    def measure(self, folder: Path) -> Answer:
        tables: dict[str, Any] = {}
        for commit in self.commits:
            for kind, file in commit.files.items():
                table = tables.setdefault(kind, {"rows": 0, "bytes": 0})
                table["rows"] += file.rows
                table["bytes"] += file.bytes
        return {
            "rows": tables["activations"]["rows"],
            "activation_bytes": tables["activations"]["bytes"],
            "bytes": sum(table["bytes"] for table in tables.values()),
            "tables": tables,
        }

    def rows(self, folder: Path, sae: BenchSae) -> tuple[np.ndarray, np.ndarray]:
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        from pipelines.schema import key

        (commit,) = self.commits  # the bench's corpus is one unit, of which it is the first
        table = pq.read_table(folder / commit.files["activations"].path, filters=pc.field("sae") == sae.id)
        token = table["token"].to_numpy() - key(0) * self.world.length
        return _ordered(self.world, table["feature"].to_numpy(), token, table["activation"].to_numpy())


class Floor(Scan):
    """What a scan with transformers' forward pass cannot do without; the scan's SAEs and contexts."""

    def __init__(self, world: World) -> None:
        import scan

        from sae_runtime import suites

        super().__init__(world)
        self.weights = [suites.load(info).W_enc.bfloat16() for info in self.scanner.infos]
        self.scanner.encoders = []
        self.model = self.scanner.model = scan.plain_model(self.scanner)
        self.work = {}
        for part, (prepared, planned) in self.parts.items():
            units, budget = len(planned.units), world.batch * world.length
            self.work[part] = scan.floor_batches(self.scanner, prepared, planned, units, budget)
            if not np.array_equal(torch.cat(self.work[part]).numpy(), world.contexts(part)):
                raise AssertionError(f"{world.spec(part)}: the scan's contexts are not the other arms'")

    def run(self, part: str, folder: Path) -> Answer:
        import scan

        scan.floor(self.scanner, self.model, self.weights, self.work[part])
        return {}

    def measure(self, folder: Path) -> Answer:
        return {}


class Script:
    """The afternoon's script. Its files are sae=N/rows.parquet; its tables are made of them by DuckDB."""

    TABLES = types.MappingProxyType(
        {
            "features": "SELECT sae, feature, count(*) AS n_tokens, count(DISTINCT context) AS n_contexts, "
            "avg(activation) AS mean, stddev_pop(activation) AS std, max(activation) AS max "
            "FROM rows GROUP BY sae, feature",
            "top": "SELECT * FROM (SELECT sae, feature, context, max(activation) AS activation, "
            "arg_max(position, activation) AS position FROM rows GROUP BY sae, feature, context) QUALIFY "
            "row_number() OVER (PARTITION BY sae, feature ORDER BY activation DESC, context) <= 20",
        }
    )

    def __init__(self, world: World) -> None:
        self.world = world
        self.model = load_model(world)
        self.saes = [load_sae(sae) for sae in world.saes]

    @torch.inference_mode()
    def run(self, part: str, folder: Path) -> Answer:
        import pyarrow as pa
        import pyarrow.parquet as pq

        began = time.perf_counter()
        contexts = self.world.contexts(part)
        schema = pa.schema(
            {"feature": pa.int32(), "context": pa.int32(), "position": pa.int16(), "activation": pa.float32()}
        )
        seen: dict[int, torch.Tensor] = {}

        def hook(layer: int) -> Any:
            def keep(module: Any, args: Any, output: Any) -> None:
                seen[layer] = output[0] if isinstance(output, tuple) else output

            return keep

        hooks = [
            self.model.layers[layer].register_forward_hook(hook(layer))
            for layer in {sae.layer for sae in self.world.saes}
        ]
        pq.write_table(pa.table({"tokens": contexts.tolist()}), folder / "contexts.parquet")
        with contextlib.ExitStack() as stack:
            writers = []
            for i in range(len(self.saes)):
                file = folder / f"activations/sae={i}/rows.parquet"
                file.parent.mkdir(parents=True)
                writers.append(stack.enter_context(pq.ParquetWriter(file, schema)))
            for start in range(0, len(contexts), self.world.batch):
                ids = torch.from_numpy(contexts[start : start + self.world.batch].astype(np.int64))
                self.model(input_ids=ids, use_cache=False)
                for sae, tensors, writer in zip(self.world.saes, self.saes, writers, strict=True):
                    pre = seen[sae.layer].float() @ tensors["W_enc"] + tensors["b_enc"]
                    pre[:, 0] = 0
                    active = pre > tensors["threshold"]
                    context, position, feature = torch.nonzero(active, as_tuple=True)
                    columns = [feature.int(), (context + start).int(), position.short(), pre[active]]
                    writer.write_table(pa.table([column.numpy() for column in columns], schema=schema))
        for handle in hooks:
            handle.remove()
        encoded = time.perf_counter()
        self.query(folder)
        return {"parts": {"encode": encoded - began, "duckdb": time.perf_counter() - encoded}}

    def query(self, folder: Path) -> None:
        import duckdb

        con = duckdb.connect(config={"threads": self.world.threads})
        files = f"{folder}/activations/*/*.parquet"
        con.sql(f"CREATE VIEW rows AS FROM read_parquet('{files}', hive_partitioning = true)")
        for name, sql in self.TABLES.items():
            con.sql(f"COPY ({sql}) TO '{folder}/{name}.parquet'")

    def measure(self, folder: Path) -> Answer:
        import pyarrow.parquet as pq

        files = list(folder.glob("activations/*/*.parquet"))
        return {
            "rows": sum(pq.read_metadata(file).num_rows for file in files),
            "activation_bytes": sum(file.stat().st_size for file in files),
            "bytes": sum(file.stat().st_size for file in folder.rglob("*.parquet")),
        }

    def rows(self, folder: Path, sae: BenchSae) -> tuple[np.ndarray, np.ndarray]:
        import pyarrow.parquet as pq

        file = folder / f"activations/sae={self.world.saes.index(sae)}/rows.parquet"
        table = pq.ParquetFile(file).read()
        columns = {name: table[name].to_numpy() for name in table.column_names}
        token = columns["context"].astype(np.int64) * self.world.length + columns["position"]
        return _ordered(self.world, columns["feature"], token, columns["activation"])


class Delphi:
    """delphi's own cache. Its package is imported a module at a time, because the whole needs vLLM."""

    SPLITS = 5  # its default

    def __init__(self, world: World) -> None:
        delphi = own_modules_of("delphi", "latents", "sparse_coders", "sparse_coders.custom")
        from delphi.latents.cache import LatentCache
        from delphi.sparse_coders.custom.gemmascope import JumpReluSae

        self.cache, self.version = LatentCache, delphi.__version__
        self.world = world
        self.model = load_model(world)
        self.encode = {}
        for sae in world.saes:
            tensors = load_sae(sae)
            own = JumpReluSae(*tensors["W_enc"].shape)
            own.load_state_dict(tensors)
            self.encode[f"layers.{sae.layer}"] = encode_but_first(own.to(self.model.dtype))
        if len(self.encode) < len(world.saes):
            raise ValueError("delphi takes one SAE a hookpoint")

    def run(self, part: str, folder: Path) -> Answer:
        began = time.perf_counter()
        contexts = torch.from_numpy(self.world.contexts(part).astype(np.int64))
        cache = self.cache(self.model, self.encode, batch_size=self.world.batch)
        cache.run(contexts.numel(), contexts)
        ran = time.perf_counter()
        cache.save_splits(self.SPLITS, folder)
        saved = time.perf_counter() - ran
        return {"parts": {"run": ran - began, "save": saved}, "version": self.version}

    def measure(self, folder: Path) -> Answer:
        from safetensors import safe_open

        rows = size = tokens = 0
        for file in folder.rglob("*.safetensors"):
            size += file.stat().st_size
            with safe_open(file, framework="np") as tensors:
                rows += tensors.get_slice("activations").get_shape()[0]
                tokens += tensors.get_tensor("tokens").nbytes
        return {"rows": rows, "activation_bytes": size - tokens, "bytes": size}

    def rows(self, folder: Path, sae: BenchSae) -> tuple[np.ndarray, np.ndarray]:
        from safetensors.numpy import load_file

        keys, values = [], []
        for file in (folder / f"layers.{sae.layer}").glob("*.safetensors"):
            found = load_file(file)
            context, position, feature = found["locations"].astype(np.int64).T
            first = int(file.stem.split("_")[0])
            keys.append((feature + first, context * self.world.length + position))
            values.append(found["activations"].astype(np.float32))
        feature, token = (np.concatenate(column) for column in zip(*keys, strict=True))
        return _ordered(self.world, feature, token, np.concatenate(values))


ARMS: dict[str, type[Arm]] = {"floor": Floor, "scan": Scan, "script": Script, "delphi": Delphi}


def load_model(world: World) -> Any:
    """The model as anyone would load it, without a head."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(world.model, dtype=torch.bfloat16).eval()


def load_sae(sae: BenchSae) -> dict[str, torch.Tensor]:
    """Tensors float32 of an SAE's file."""
    with np.load(sae.path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def encode_but_first(sae: Any) -> Any:
    """delphi's encoder, which then drops each context's first token, as delphi's users mask a BOS."""

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = sae.encode(x)
        found[:, 0] = 0
        return found

    return encode


def own_modules_of(name: str, *packages: str) -> Any:
    """Import a package such that `packages` inside it are mere folders: their __init__ is not run."""
    whole = __import__(name)
    for package in packages:
        folder = types.ModuleType(f"{name}.{package}")
        folder.__path__ = [str(Path(whole.__file__).parent.joinpath(*package.split(".")))]
        sys.modules[folder.__name__] = folder
    return whole


def _ordered(
    world: World, feature: np.ndarray, token: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    keys = feature.astype(np.int64) * world.contexts("run").size + token
    order = np.argsort(keys, kind="stable")
    return keys[order], value[order]


def loaded_bytes() -> int:
    """Bytes resident once loading is over and what it left is given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return forget_peak()


def forget_peak() -> int:
    """Begin a new peak of memory (on Linux; elsewhere the old one stays); bytes resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that were resident since `forget_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def busy_seconds() -> float:
    """CPU seconds that this machine has spent on anything, or lost to its host; 0 where that is not told."""
    try:
        user, nice, system, _, _, *rest = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, *rest))) / os.sysconf("SC_CLK_TCK")


def answer(arm: Arm, world: World, folder: Path, command: str, file: str, loaded: int) -> Answer:
    """Carry out a command; `loaded` bytes are model and SAEs."""
    if command == "keys":
        columns = {}
        for i, sae in enumerate(world.saes):
            columns[f"keys{i}"], columns[f"values{i}"] = arm.rows(folder, sae)
        np.savez(file, **columns)
        return {}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    gc.collect()
    forget_peak()
    busy, own, began = busy_seconds(), time.process_time(), time.perf_counter()
    found = arm.run(command, folder)
    seconds, own, busy = time.perf_counter() - began, time.process_time() - own, busy_seconds() - busy
    others = max(0.0, busy - own) / seconds / (os.cpu_count() or 1)
    memory = {"before": loaded, "peak": peak()}
    return {"seconds": seconds, "others": others, **memory, **found, **arm.measure(folder)}


def main() -> None:
    name, world_folder, out = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    world = World.load(Path(world_folder))
    torch.set_num_threads(world.threads)
    if name == "script":
        import pyarrow as pa

        pa.set_cpu_count(world.threads)
    arm = ARMS[name](world)
    loaded = loaded_bytes()
    print(json.dumps({"ready": name, "torch": torch.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        command, _, file = line.strip().partition(" ")
        print(json.dumps(answer(arm, world, Path(out), command, file, loaded)), file=replies, flush=True)


if __name__ == "__main__":
    main()
