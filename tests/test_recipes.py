"""Every recipe against a slow answer from the raw rows of two scans.

`plain` is the tiny index; `signed` has activations of both signs, two runs, an SAE group of each `keep`, and
tokens left out by `norm_above`. A recipe is checked by the function check_<name> of this file.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from click.testing import CliRunner

import queries
from jobs.cli import cli
from pipelines.compaction import compact
from pipelines.storage import Store
from queries.lookup import rows
from queries.recipe import FOLDER, _document, recipes, run, statement
from sae_runtime import suites
from sae_runtime.errors import InputError
from sae_runtime.sae import SaeInfo, SaeWeights

PAGE = (Path(__file__).parent.parent / "docs/RECIPES.md").read_text(encoding="utf-8")
KEEPS = {"tiny-res": "tokens", "tiny-mlp": "documents", "tiny-att": "none"}
Place = tuple[int, int]  # context, position
Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """An index and its raw rows."""

    con: duckdb.DuckDBPyConnection
    documents: dict[int, Row]
    contexts: dict[int, Row]
    active: dict[str, dict[int, dict[Place, float]]]  # by SAE and feature, of SAEs that keep tokens
    saes: dict[str, Row]
    spelling: dict[int, bytes]

    def ask(self, recipe: str, **params: Any) -> list[Row]:
        given = {name: str(value) for name, value in params.items()}
        return list(rows(run(self.con, recipe, given)))

    def picked(self) -> list[tuple[str, int]]:
        """A rare, a middling and a frequent feature of each SAE that has token rows."""
        found = []
        for sae, features in self.active.items():
            some = sorted((len(where), feature) for feature, where in features.items() if len(where) > 3)
            found += [(sae, some[int(q * (len(some) - 1))][1]) for q in (0.1, 0.5, 0.95)]
        return found

    def counted(self) -> Iterator[tuple[Place, int]]:
        for key, context in self.contexts.items():
            for position, token in enumerate(context["tokens"]):
                if context["counted"][position]:
                    yield (key, position), token

    def text(self, context: int, position: int, width: int) -> str:
        tokens = self.contexts[context]["tokens"][max(position - width, 0) : position + width + 1]
        return b"".join(self.spelling[token] for token in tokens).decode(errors="replace")

    def by_document(self, sae: str, feature: int) -> dict[int, list[float]]:
        found: dict[int, list[float]] = defaultdict(list)
        for (context, _), value in self.active[sae].get(feature, {}).items():
            found[self.contexts[context]["document"]].append(value)
        return found

    def place(self, context: int) -> tuple[Any, ...]:
        own = self.contexts[context]
        document = self.documents[own["document"]]
        return document["corpus"], document["source"], document["row"], own["start"]

    def whole(self, sae: str) -> bool:
        return self.saes[sae]["n_tokens"] == sum(row["n_tokens"] for row in self.documents.values())


def world_of(index: Path) -> World:
    compact(Store(str(index)))
    con = queries.connect(str(index))

    def table(sql: str) -> list[Row]:
        return list(rows(con.execute(sql)))

    saes = {row["sae"]: row for row in table("SELECT * FROM saes")}
    active: dict[str, dict[int, dict[Place, float]]] = {}
    for sae, row in saes.items():
        if row["keep"] == "tokens":
            active[sae] = defaultdict(dict)
            for one in table(f"SELECT * FROM activations WHERE sae = '{sae}'"):
                active[sae][one["feature"]][one["context"], one["position"]] = one["activation"]
    return World(
        con,
        {row["document"]: row for row in table("SELECT * FROM documents")},
        {row["context"]: row for row in table("SELECT * FROM contexts")},
        active,
        saes,
        {row["token"]: row["bytes"] for row in table("SELECT token, bytes FROM vocabulary")},
    )


@pytest.fixture(scope="module")
def plain(tiny_index: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("plain") / "index"
    shutil.copytree(tiny_index, folder)
    return world_of(folder)


@pytest.fixture(scope="module")
def signed(
    tmp_path_factory: pytest.TempPathFactory,
    write_spec: Callable[..., Path],
    scan_inline: Callable[..., Any],
    tiny_suites: Path,
    tiny_corpus: Path,
) -> World:
    load = suites.load

    def load_signed(info: SaeInfo) -> SaeWeights:
        return replace(load(info), rule="abstopk", k=5, threshold=None)

    folder = tmp_path_factory.mktemp("signed")
    saes = [{"uri": str(tiny_suites / suite), "keep": keep} for suite, keep in KEEPS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "load", load_signed)
        for files in (6, 9):
            uri = [str(tiny_corpus / f"part_{i:02d}.jsonl") for i in range(files)]
            spec = write_spec(
                folder,
                corpus={"uri": uri},
                saes=saes,
                context={"length": 40, "overlap": 7, "exclude": ["special", "first", {"norm_above": 1.3}]},
            )
            assert not scan_inline(spec).failed
    world = world_of(folder / "index")
    assert len({row["run"] for row in world.documents.values()}) == 2
    assert any(value < 0 for found in world.active.values() for f in found.values() for value in f.values())
    assert not any(world.whole(sae) for sae in world.active)
    return world


@pytest.fixture(scope="module", params=["plain", "signed"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


def furthest(values: Any) -> float:
    return float(max(values, key=lambda v: (abs(v), v)))


def same(found: list[Row], wanted: list[Row]) -> None:
    """Equal rows in order; doubles to 1e-9, of `found` only the columns that are wanted."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for key, value in other.items():
            if isinstance(value, float):
                assert one[key] == pytest.approx(value, rel=1e-9, abs=1e-12), (key, one, other)
            else:
                assert one[key] == value, (key, one, other)


def test_every_recipe_is_checked_and_documented() -> None:
    names = {recipe.name for recipe in recipes()}
    assert names == {file.stem for file in FOLDER.glob("*.sql")}
    assert len(names) >= 20
    for recipe in recipes():
        assert f"check_{recipe.name}" in globals(), recipe.name
        assert recipe.needs, recipe.name
        assert recipe.words, recipe.name
        used = set(re.findall(r"\$(\w+)", recipe.sql))
        assert used == {param.name for param in recipe.params}, recipe.name


@pytest.mark.parametrize("name", sorted(recipe.name for recipe in recipes()))
def test_a_recipe_equals_the_slow_answer(name: str, world: World) -> None:
    globals()[f"check_{name}"](world)


# --- features


def check_feature_statistics(world: World) -> None:
    for sae, feature in world.picked():
        where = world.active[sae][feature]
        values = list(where.values())
        sizes = [abs(value) for value in values]
        mean = math.fsum(values) / len(values)
        bins = np.searchsorted([2 ** (-10 + i / 8) for i in range(193)], sizes, side="right")
        (found,) = world.ask("feature_statistics", sae=sae, feature=feature)
        wanted = {
            "sae": sae, "feature": feature, "n_tokens": len(values),
            "n_contexts": len({context for context, _ in where}),
            "n_documents": len(world.by_document(sae, feature)),
            "density": len(values) / world.saes[sae]["n_tokens"],
            "mean_active": mean, "max": furthest(values),
            "histogram": np.bincount(bins, minlength=194).tolist(),
        }  # fmt: skip
        same([found], [wanted])
        assert found["std_active"] == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-9)
        for q in (50, 90, 99):
            exact = sorted(sizes)[math.ceil(q / 100 * len(sizes)) - 1]
            assert not 2**-10 <= exact < 2**14 or exact / 1.045 <= found[f"p{q}"] <= exact * 1.045


def check_dead_features(world: World) -> None:
    for sae, found in world.active.items():
        width = world.saes[sae]["width"]
        dead = [feature for feature in range(width) if not found.get(feature)]
        wanted = [
            {"sae": sae, "feature": feature, "layer": world.saes[sae]["layer"],
             "counted": world.saes[sae]["n_tokens"], "dead": len(dead), "dead_share": len(dead) / width}
            for feature in dead
        ]  # fmt: skip
        same(world.ask("dead_features", sae=sae, limit="all"), wanted)
        same(world.ask("dead_features", sae=sae, limit=1), wanted[:1])
    every = [(row["sae"], row["feature"]) for row in world.ask("dead_features", limit="all")]
    assert every == sorted(every)
    assert {*every} >= {(sae, f) for sae, found in world.active.items() for f in range(3) if not found.get(f)}


def check_dense_features(world: World) -> None:
    for sae, found in world.active.items():
        n = world.saes[sae]["n_tokens"]
        wanted = [
            {"sae": sae, "feature": feature, "density": len(where) / n, "max": furthest(where.values())}
            for feature, where in found.items() if len(where) / n >= 0.05
        ]  # fmt: skip
        wanted.sort(key=lambda row: (-row["density"], row["feature"]))
        assert wanted
        same(world.ask("dense_features", sae=sae, density=0.05, limit="all"), wanted)
        same(world.ask("dense_features", sae=sae, density=wanted[-1]["density"], limit="all"), wanted)


def check_sae_sparsity(world: World) -> None:
    every = world.ask("sae_sparsity", density=0.05)
    keys = [(row["layer"], row["site"], row["width"], row["sae"]) for row in every]
    assert keys == sorted(keys)
    found = {row["sae"]: row for row in every}
    assert set(found) == set(world.saes)
    for sae, features in world.active.items():
        row, n, width = found[sae], world.saes[sae]["n_tokens"], world.saes[sae]["width"]
        sizes = [len(where) for where in features.values()]
        wanted = {
            "layer": world.saes[sae]["layer"], "width": width, "measured_l0": sum(sizes) / n,
            "mean_density": sum(sizes) / n / width, "dead": width - len(sizes),
            "dead_share": (width - len(sizes)) / width, "dense": sum(size / n >= 0.05 for size in sizes),
            "median_density": statistics.median(size / n for size in sizes),
        }  # fmt: skip
        same([row], [wanted])


def check_l0_distribution(world: World) -> None:
    for sae, features in world.active.items():
        n = world.saes[sae]["n_tokens"]
        l0 = Counter(place for where in features.values() for place in where)
        counts = sorted([*l0.values(), *[0] * (n - len(l0))])
        wanted = {
            "sae": sae, "n_tokens": n, "none": n - len(l0), "mean": sum(counts) / n,
            "min": counts[0], "max": counts[-1],
            **{f"p{q}": counts[max(math.ceil(q * n / 100) - 1, 0)] for q in (10, 50, 90, 99)},
        }  # fmt: skip
        same(world.ask("l0_distribution", sae=sae), [wanted])


# --- contexts


def check_top_contexts(world: World) -> None:
    """One offer a document, equal endings of 16 tokens left out, then the highest four."""
    for sae, feature in world.picked()[::2]:
        offers: dict[int, tuple[Any, ...]] = {}
        for (context, position), value in world.active[sae][feature].items():
            offer = (-abs(value), -value, world.place(context), position, context, value)
            document = world.contexts[context]["document"]
            offers[document] = min(offers.get(document, offer), offer)
        wanted, endings = [], set()
        for _, _, place, position, context, value in sorted(offers.values(), key=lambda o: (o[0], o[2])):
            ending = tuple(world.contexts[context]["tokens"][max(position - 15, 0) : position + 1])
            if ending in endings:
                continue
            endings.add(ending)
            near = sorted(
                (p, v) for (c, p), v in world.active[sae][feature].items()
                if c == context and abs(p - position) <= 64
            )  # fmt: skip
            wanted.append(
                {"rank": len(wanted) + 1, "activation": value, "corpus": place[0], "source": place[1],
                 "row": place[2], "context": context, "position": position,
                 "text": world.text(context, position, 6),
                 "positions": [p for p, _ in near], "values": [v for _, v in near]}
            )  # fmt: skip
        same(world.ask("top_contexts", sae=sae, feature=feature, width=6), wanted[:4])
        same(world.ask("top_contexts", sae=sae, feature=feature, width=6, limit=2), wanted[:2])


def check_quantile_contexts(world: World) -> None:
    """Strata and quantiles from the rows; the contexts, from the sample and the definition of the hash."""
    for sae, feature in world.picked()[::2]:
        where = world.active[sae][feature]
        maxima: dict[int, float] = {}
        for (context, _), value in where.items():
            maxima[context] = furthest([maxima.get(context, 0.0), value])
        strata: dict[int, set[int]] = defaultdict(set)
        for context, value in maxima.items():
            strata[math.floor(math.log2(abs(value)))].add(context)
        sampled: dict[int, list[int]] = defaultdict(list)
        for stratum, context in world.con.execute(
            "SELECT stratum, context FROM sampled_contexts WHERE sae = ? AND feature = ?", [sae, feature]
        ).fetchall():
            sampled[stratum].append(context)

        def draw(context: int) -> str:
            return hashlib.md5("/".join(map(str, world.place(context))).encode()).hexdigest()

        def share(values: list[float], top: float) -> float:
            return sum(abs(value) < top for value in values) / len(values)

        wanted = []
        for stratum in sorted(strata, reverse=True):
            low, high = 2.0**stratum, 2.0 ** (stratum + 1)
            for context in sorted(sampled[stratum], key=draw)[:2]:
                assert context in strata[stratum]
                tokens = [share(list(where.values()), edge) for edge in (low, high)]
                wanted.append(
                    {"stratum": stratum, "stratum_contexts": len(strata[stratum]), "context": context,
                     "contexts_from": share(list(maxima.values()), low),
                     "contexts_to": share(list(maxima.values()), high),
                     "tokens_from": tokens[0] if stratum >= -10 else None,
                     "tokens_to": (tokens[1] if stratum >= -11 else None) if stratum < 14 else 1.0,
                     "activation": maxima[context]}
                )  # fmt: skip
        found = world.ask("quantile_contexts", sae=sae, feature=feature, limit=2)
        same(found, wanted)
        assert all(row["text"] == world.text(row["context"], row["position"], 20) for row in found)
        assert len(world.ask("quantile_contexts", sae=sae, feature=feature, limit="all")) == sum(
            map(len, sampled.values())
        )


def check_inactive_contexts(world: World) -> None:
    for sae, feature in world.picked():
        active = {context for context, _ in world.active[sae][feature]}
        idle = [key for key, row in world.contexts.items() if any(row["counted"]) and key not in active]
        for seed in (0, 7):
            idle.sort(
                key=lambda c: hashlib.md5("/".join(map(str, (seed, *world.place(c)))).encode()).hexdigest()
            )
            found = world.ask("inactive_contexts", sae=sae, feature=feature, seed=seed, limit=12, width=9)
            wanted = [
                {"sae": sae, "feature": feature, "context": c, "text": world.text(c, 9, 9)} for c in idle
            ]
            same(found, wanted[:12])


def check_inactive_documents(world: World) -> None:
    for sae, feature in world.picked():
        active = world.by_document(sae, feature)
        idle = [row for row in world.documents.values() if row["n_tokens"] and row["document"] not in active]

        def draw(row: Row) -> str:
            return hashlib.md5(f"3/{row['corpus']}/{row['source']}/{row['row']}".encode()).hexdigest()

        wanted = [{"document": row["document"], "counted": row["n_tokens"]} for row in sorted(idle, key=draw)]
        same(world.ask("inactive_documents", sae=sae, feature=feature, seed=3, limit=10), wanted[:10])


# --- tokens


def check_single_token_features(world: World) -> None:
    occurring = Counter(token for _, token in world.counted())
    some = 0
    for sae, features in world.active.items():
        wanted = []
        for feature, where in features.items():
            tokens = Counter(world.contexts[c]["tokens"][p] for c, p in where)
            token = min(tokens, key=lambda t: (-tokens[t], t))
            if len(where) >= 4 and tokens[token] >= 0.2 * len(where):
                wanted.append(
                    {"sae": sae, "feature": feature, "token": token, "share": tokens[token] / len(where),
                     "token_share": tokens[token] / occurring[token], "n_tokens": len(where),
                     "occurrences": occurring[token]}
                )  # fmt: skip
        wanted.sort(key=lambda row: (-row["share"], -row["n_tokens"], row["feature"]))
        some += len(wanted)
        same(world.ask("single_token_features", sae=sae, share=0.2, min_tokens=4, limit="all"), wanted)
    assert some


def check_single_token_top_contexts(world: World) -> None:
    some = 0
    for sae in world.saes:
        maxima: dict[int, list[int]] = defaultdict(list)
        for feature, context, position in world.con.execute(
            "SELECT feature, context, position FROM top_contexts WHERE sae = ?", [sae]
        ).fetchall():
            maxima[feature].append(world.contexts[context]["tokens"][position])
        highest = dict(
            world.con.execute("SELECT feature, abs(max) FROM features WHERE sae = ?", [sae]).fetchall()
        )
        wanted = []
        for feature, found in maxima.items():
            tokens = Counter(found)
            token = min(tokens, key=lambda t: (-tokens[t], t))
            if len(found) >= 2 and tokens[token] >= 0.5 * len(found):
                wanted.append(
                    {"sae": sae, "feature": feature, "token": token, "share": tokens[token] / len(found),
                     "n_contexts": len(found)}
                )  # fmt: skip
        wanted.sort(key=lambda r: (-r["share"], -r["n_contexts"], -highest[r["feature"]], r["feature"]))
        some += len(wanted)
        same(world.ask("single_token_top_contexts", sae=sae, share=0.5, min_contexts=2, limit="all"), wanted)
    assert some


def refuses_left_out_tokens(world: World, recipe: str, **params: Any) -> bool:
    if world.whole(params["sae"]):
        return False
    with pytest.raises(InputError, match=r"norm_above.*\d tokens"):
        world.ask(recipe, **params)
    return True


def check_token_l0(world: World) -> None:
    for sae, features in world.active.items():
        if refuses_left_out_tokens(world, "token_l0", sae=sae):
            continue
        occurring = Counter(token for _, token in world.counted())
        active = Counter(world.contexts[c]["tokens"][p] for where in features.values() for c, p in where)
        wanted = [
            {"sae": sae, "token": token, "n_tokens": n, "active": active[token], "l0": active[token] / n}
            for token, n in occurring.items() if n >= 3
        ]  # fmt: skip
        wanted.sort(key=lambda row: (-row["l0"], -row["n_tokens"], row["token"]))
        same(world.ask("token_l0", sae=sae, min_tokens=3, limit="all"), wanted)


def check_token_density(world: World) -> None:
    for sae, feature in world.picked():
        if refuses_left_out_tokens(world, "token_density", sae=sae, feature=feature):
            continue
        where = world.active[sae][feature]
        occurring = Counter(token for _, token in world.counted())
        active = Counter(world.contexts[c]["tokens"][p] for c, p in where)
        wanted = [
            {"feature": feature, "token": token, "n_tokens": n, "active": active[token],
             "density": active[token] / n, "share": active[token] / len(where)}
            for token, n in occurring.items() if n >= 2
        ]  # fmt: skip
        for sort in ("active", "density"):
            wanted.sort(key=lambda row: (-row[sort], -row["n_tokens"], row["token"]))
            found = world.ask("token_density", sae=sae, feature=feature, sort=sort, min_tokens=2, limit="all")
            same(found, wanted)


def by_position(world: World, active: Counter[int]) -> list[tuple[int, int, int]]:
    counted = Counter(position for (_, position), _ in world.counted())
    return [(position, n, active[position]) for position, n in sorted(counted.items())]


def check_position_l0(world: World) -> None:
    for sae, features in world.active.items():
        if refuses_left_out_tokens(world, "position_l0", sae=sae):
            continue
        active = Counter(position for where in features.values() for _, position in where)
        wanted = [
            {"sae": sae, "position": p, "n_tokens": n, "active": a, "l0": a / n}
            for p, n, a in by_position(world, active)
        ]
        same(world.ask("position_l0", sae=sae), wanted)


def check_position_density(world: World) -> None:
    for sae, feature in world.picked():
        if refuses_left_out_tokens(world, "position_density", sae=sae, feature=feature):
            continue
        active = Counter(position for _, position in world.active[sae][feature])
        wanted = [
            {"feature": feature, "position": p, "n_tokens": n, "active": a, "density": a / n}
            for p, n, a in by_position(world, active)
        ]
        same(world.ask("position_density", sae=sae, feature=feature, limit=5), wanted[:5])


# --- documents and phrases


def check_features_on_document(world: World) -> None:
    longest = sorted(world.documents.values(), key=lambda row: -row["n_tokens"])[:2]
    for row in longest:
        for sae, features in world.active.items():
            wanted = []
            for feature in features:
                values = world.by_document(sae, feature).get(row["document"])
                if values:
                    wanted.append(
                        {"sae": sae, "feature": feature, "n_tokens": len(values),
                         "share": len(values) / row["n_tokens"], "max": furthest(values),
                         "sum": math.fsum(values)}
                    )  # fmt: skip
            wanted.sort(key=lambda r: (-abs(r["max"]), r["feature"]))
            assert wanted
            found = world.ask("features_on_document", document=row["document"], sae=sae, limit="all")
            same(found, wanted)
            assert world.ask("features_on_document", document=row["id"], sae=sae, limit="all") == found


PHRASES = ("the", "t", "e c", "raise ValueError if", "日本", "😀", " ri", "\n", "no such words at all", "tt")


def check_features_on_phrase(world: World) -> None:
    found_some = 0
    for phrase in PHRASES:
        bytes_ = phrase.encode()
        occurrences: list[set[Place]] = []
        for key, context in world.contexts.items():
            text, owner = b"", []
            for position, token in enumerate(context["tokens"]):
                text += world.spelling[token]
                owner += [position] * len(world.spelling[token])
            for at in range(len(text)):
                if text.startswith(bytes_, at) and owner[at + len(bytes_) - 1] >= context["first"]:
                    last = owner[at + len(bytes_) - 1]
                    occurrences.append({(key, p) for p in range(owner[at], last + 1)})
        found_some += bool(occurrences)
        for sae, features in world.active.items():
            wanted = []
            for feature, where in features.items():
                hit = [places & where.keys() for places in occurrences]
                tokens = set().union(*hit)
                if tokens:
                    n = sum(map(bool, hit))
                    wanted.append(
                        {"sae": sae, "feature": feature, "occurrences": n, "share": n / len(occurrences),
                         "n_tokens": len(tokens), "max": furthest(where[p] for p in tokens),
                         "density": len(where) / world.saes[sae]["n_tokens"]}
                    )  # fmt: skip
            wanted.sort(key=lambda r: (-r["share"], r["density"], r["feature"]))
            same(world.ask("features_on_phrase", phrase=phrase, sae=sae, limit="all"), wanted)
    assert found_some >= 7


# --- sets of documents


def compared(world: World, sae: str, a: set[int], b: set[int], least: int) -> list[Row]:
    a, b = ({d for d in found if world.documents[d]["n_tokens"]} for found in (a, b))
    tokens = [sum(world.documents[d]["n_tokens"] for d in found) for found in (a, b)]
    wanted = []
    for feature in world.active[sae]:
        values = world.by_document(sae, feature)
        docs = [sum(d in found for d in values) for found in (a, b)]
        n = [sum(len(values[d]) for d in values if d in found) for found in (a, b)]
        if sum(docs) < least:
            continue
        row: Row = {
            "sae": sae, "feature": feature, "a_documents": docs[0], "b_documents": docs[1],
            "a_rate": docs[0] / len(a), "b_rate": docs[1] / len(b),
            "log2_rate": math.log2((docs[0] + 0.5) / (len(a) + 1) / ((docs[1] + 0.5) / (len(b) + 1))),
            "a_density": None, "b_density": None, "log2_density": None,
        }  # fmt: skip
        if world.whole(sae):
            row |= {
                "a_density": n[0] / tokens[0], "b_density": n[1] / tokens[1],
                "log2_density": math.log2((n[0] + 0.5) / (tokens[0] + 1) / ((n[1] + 0.5) / (tokens[1] + 1))),
            }  # fmt: skip
        wanted.append(row)
    assert wanted
    return wanted


def changed(row: Row) -> tuple[float, int]:
    ratio = row["log2_rate"] if row["log2_density"] is None else row["log2_density"]
    return -round(abs(ratio), 9), row["feature"]


def agree(found: list[Row], wanted: list[Row], order: Callable[[Row], Any]) -> None:
    """The same rows, in an order by ratios that rounding may turn where they are equal."""
    assert [order(row)[0] for row in found] == [order(row)[0] for row in sorted(wanted, key=order)]
    same(sorted(found, key=lambda row: row["feature"]), sorted(wanted, key=lambda row: row["feature"]))


def check_metadata_features(world: World) -> None:
    for column, value in (("lang", "ja"), ("even", "true"), ("score", "10.25")):
        some = {
            d for d, row in world.documents.items()
            if (str(row[column]).lower() if column == "even" else str(row[column])) == value
        }  # fmt: skip
        if not some:
            continue
        rest = set(world.documents) - some
        for sae in world.active:
            wanted = compared(world, sae, some, rest, 2)
            n = sum(bool(row["n_tokens"]) for row in world.documents.values())
            for row in wanted:
                row["lift"] = row["a_rate"] / ((row["a_documents"] + row["b_documents"]) / n)
            found = world.ask(
                "metadata_features", sae=sae, column=column, value=value, min_documents=2, limit="all"
            )
            agree(found, wanted, lambda row: (-round(row["log2_rate"], 9), row["feature"]))


def check_drift_runs(world: World) -> None:
    runs = {row["run"] for row in world.documents.values()}
    sae = next(iter(world.active))
    if runs == {1}:
        with pytest.raises(InputError, match="runs 1 and 2 do not both have documents"):
            world.ask("drift_runs", sae=sae, a=1, b=2)
        return
    for sae in world.active:
        sets = [{d for d, row in world.documents.items() if row["run"] == run} for run in (1, 2)]
        found = world.ask("drift_runs", sae=sae, a=1, b=2, min_documents=2, limit="all")
        agree(found, compared(world, sae, *sets, 2), changed)


def check_drift_ranges(world: World) -> None:
    for column, start, cut, top in (
        ("score", "all", "5", "9.5"), ("score", "2.5", "10", "20"), ("lang", "all", "f", "k")
    ):  # fmt: skip
        kind = float if column == "score" else str

        def between(low: Any, high: Any, column: str = column) -> set[int]:
            return {
                d for d, row in world.documents.items()
                if row[column] is not None
                and (low is None or row[column] >= low) and (high is None or row[column] < high)
            }  # fmt: skip

        sets = between(None if start == "all" else kind(start), kind(cut)), between(kind(cut), kind(top))
        params = {
            "column": column,
            "a_from": start,
            "a_to": cut,
            "b_from": cut,
            "b_to": top,
            "min_documents": 2,
            "limit": "all",
        }
        for sae in world.active:
            if not all(any(world.documents[d]["n_tokens"] for d in found) for found in sets):
                with pytest.raises(InputError, match="do not both have documents"):
                    world.ask("drift_ranges", sae=sae, **params)
                continue
            agree(world.ask("drift_ranges", sae=sae, **params), compared(world, sae, *sets, 2), changed)
    with pytest.raises(InputError, match="share documents"):
        world.ask("drift_ranges", sae=sae, column="score", a_to=8, b_from=2)


# --- pairs of features


def pairs(world: World, sae: str, feature: int, other: str, by: str, least: int) -> list[Row]:
    def units(sae: str, feature: int) -> set[Any]:
        if by == "tokens":
            return set(world.active[sae][feature])
        return set(world.by_document(sae, feature))

    own = units(sae, feature)
    wanted = []
    for number in world.active[other]:
        if (other, number) == (sae, feature):
            continue
        its = units(other, number)
        both = len(own & its)
        if both >= least:
            wanted.append(
                {"sae": sae, "feature": feature, "other_sae": other, "other_feature": number, "n_both": both,
                 f"n_{by}": len(own), f"other_n_{by}": len(its), "jaccard": both / len(own | its)}
            )  # fmt: skip
    return wanted


def check_cofiring(world: World, by: str) -> None:
    recipe = f"cofiring_{by}"
    everything = sum(row["n_tokens"] for row in world.documents.values())
    some = 0
    for sae, feature in world.picked()[1::4]:
        elsewhere = [other for other in world.active if other != sae]
        for other in (sae, elsewhere[0], elsewhere[-1]):
            wanted = pairs(world, sae, feature, other, by, 2)
            alike = world.saes[sae]["site"] == world.saes[other]["site"]
            n = world.saes[sae]["n_tokens"] if alike else everything
            if by == "documents":
                n = sum(bool(row["n_tokens"]) for row in world.documents.values())
            for row in wanted:
                mine, its = row["n_both"] / row[f"n_{by}"], row["n_both"] / row[f"other_n_{by}"]
                lift = row["n_both"] / n / (row[f"n_{by}"] / n * row[f"other_n_{by}"] / n)
                row |= {"other_given_feature": mine, "feature_given_other": its, "lift": lift}
                row |= {"pmi": math.log2(lift)}
            wanted.sort(key=lambda row: (-row["n_both"], row["other_feature"]))
            params = {"sae": sae, "feature": feature, "min_both": 2, "sort": "n_both"}
            same(world.ask(recipe, **params, other=other, limit="all"), wanted)
            for sort in ("jaccard", "lift"):
                found = world.ask(recipe, **params | {"sort": sort}, other=other, limit=5)
                best = sorted((row[sort] for row in wanted), reverse=True)[:5]
                assert [row[sort] for row in found] == pytest.approx(best)
            some += len(wanted)
            if other == sae:
                assert len(world.ask(recipe, **params, limit="all")) == len(wanted)
    assert some > 50


def check_cofiring_tokens(world: World) -> None:
    check_cofiring(world, "tokens")


def check_cofiring_documents(world: World) -> None:
    check_cofiring(world, "documents")


def check_wider(world: World, by: str) -> None:
    narrow, wide = "tiny-res/layer_1/width_37/average_l0_2", "tiny-res/layer_1/width_130/average_l0_13"
    for feature in (f for sae, f in world.picked() if sae == narrow):
        wanted = pairs(world, narrow, feature, wide, by, 3)
        for row in wanted:
            row |= {"covered": row["n_both"] / row[f"n_{by}"], "within": row["n_both"] / row[f"other_n_{by}"]}
        for sort in ("jaccard", "covered", "within"):
            params = {"sae": narrow, "feature": feature, "other": wide, "min_both": 3, "sort": sort}
            found = world.ask(f"wider_{by}", **params, limit="all")
            wanted.sort(key=lambda row: (-row[sort], row["other_feature"]))
            same(found, wanted)
            same(world.ask(f"wider_{by}", **params, limit=1), wanted[:1])
    for other in (narrow, "tiny-res/layer_3/width_130/average_l0_6"):
        with pytest.raises(InputError, match="that is wider; there are tiny-res/layer_1/width_130"):
            world.ask(f"wider_{by}", sae=narrow, feature=0, other=other)


def check_wider_tokens(world: World) -> None:
    check_wider(world, "tokens")


def check_wider_documents(world: World) -> None:
    check_wider(world, "documents")


# --- all SAEs at once


def test_co_firing_with_every_sae_is_that_with_each(plain: World) -> None:
    sae, feature = plain.picked()[4]
    for recipe in ("cofiring_tokens", "cofiring_documents"):
        params = {"sae": sae, "feature": feature, "min_both": 1, "limit": "all"}
        each = [row for other in plain.saes for row in plain.ask(recipe, **params, other=other)]
        found = plain.ask(recipe, **params, other="all")
        assert len({row["other_sae"] for row in found}) == len(plain.saes)
        key = lambda row: (row["other_sae"], row["other_feature"])  # noqa: E731
        assert sorted(found, key=key) == sorted(each, key=key)


def test_optional_saes(plain: World) -> None:
    for recipe, params in (
        ("features_on_phrase", {"phrase": "the cat"}),
        ("features_on_document", {"document": "1-0"}),
        ("l0_distribution", {}),
    ):
        more = {"limit": "all"} if recipe != "l0_distribution" else {}
        each = [row for sae in plain.saes for row in plain.ask(recipe, **params, **more, sae=sae)]
        found = plain.ask(recipe, **params, **more)
        assert sorted(map(str, found)) == sorted(map(str, each))


# --- what is refused


def test_rows_that_were_not_kept_are_refused_by_name(signed: World) -> None:
    mlp, att = (next(sae for sae in signed.saes if sae.startswith(s)) for s in ("tiny-mlp", "tiny-att"))
    res = next(iter(signed.active))
    refused = [
        ("inactive_contexts", {"sae": mlp, "feature": "1"}, rf"activations .*{mlp} \(keep documents\)$"),
        ("inactive_documents", {"sae": att, "feature": "1"}, rf"document_features .*{att} \(keep none\)$"),
        ("l0_distribution", {}, r"tiny-att.* and 1 more; give --param sae=tiny-res"),
        ("cofiring_tokens", {"sae": res, "feature": "1", "other": mlp}, rf"{mlp} \(keep documents\)"),
        ("cofiring_tokens", {"sae": res, "feature": "1", "other": "all"}, "give --param other=tiny-res"),
        ("features_on_document", {"document": "0"}, r"keep none.*give --param sae=tiny-(mlp|res)"),
    ]
    for recipe, params, match in refused:
        with pytest.raises(InputError, match=match) as caught:
            run(signed.con, recipe, params)
        assert "\n" not in str(caught.value)
    assert run(signed.con, "inactive_documents", {"sae": mlp, "feature": "1"}).fetchall()
    assert run(signed.con, "top_contexts", {"sae": att, "feature": "1"}).fetchall()
    assert run(signed.con, "cofiring_documents", {"sae": mlp, "feature": "1", "other": res}).fetchall()


@pytest.mark.parametrize(
    ("recipe", "params", "match"),
    [
        ("top_context", {}, "there is no 'top_context'; there are cofiring_documents"),
        ("top_contexts", {"sae": "width_64/average_l0_3"}, "'feature' is missing"),
        ("top_contexts", {"sae": "width_64/average_l0_3", "feature": "1", "k": "2"}, "no parameter 'k'"),
        ("top_contexts", {"sae": "width_64/average_l0_3", "feature": "64"}, "features 0 to 63"),
        ("top_contexts", {"sae": "width_64/average_l0_3", "feature": "-1"}, "features 0 to 63"),
        ("top_contexts", {"sae": "width_64/average_l0_3", "feature": "one"}, "feature=one: a whole number"),
        ("top_contexts", {"sae": "width_64/average_l0_3", "feature": "1", "limit": "0"}, "from 1"),
        ("top_contexts", {"sae": "width_64/average_l0_3", "feature": "all"}, "feature=all: a whole number"),
        ("top_contexts", {"sae": "all", "feature": "1"}, "sae=all: one SAE is wanted"),
        ("top_contexts", {"sae": "width_65", "feature": "1"}, "names no SAE"),
        ("dense_features", {"density": "much"}, "density=much: a number"),
        ("dense_features", {"density": "nan"}, "density=nan: a finite number"),
        ("features_on_phrase", {"phrase": ""}, "a text is wanted"),
        ("features_on_document", {"document": "nowhere"}, "no document has this id"),
        ("cofiring_tokens", {"sae": "width_64/average_l0_3", "feature": "1", "sort": "p"}, "one of jaccard"),
        ("metadata_features", {"sae": "width_64/average_l0_3", "column": "x", "value": "1"}, "there are doc"),
        ("metadata_features", {"sae": "width_64/average_l0_3", "column": "lang", "value": "'"}, "no doc"),
        ("drift_ranges", {"sae": "width_64/average_l0_3", "column": "score", "a_to": "x"}, "x"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_one_line(plain: World, recipe: str, params: Row, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        run(plain.con, recipe, params).fetchall()
    assert "\n" not in str(caught.value)


def test_a_document_is_named_by_its_id_or_its_key(plain: World) -> None:
    """An id that is another document's key names none of them."""
    key, row = next((key, row) for key, row in plain.documents.items() if row["n_tokens"] > 5)
    asked = [
        plain.ask("features_on_document", document=name, sae=next(iter(plain.active)), limit="all")
        for name in (key, row["id"])
    ]
    assert asked[0] == asked[1] != []
    con = duckdb.connect()
    con.execute(
        "CREATE TABLE documents AS FROM (VALUES (7, '8'), (8, 'x'), (9, 'y'), (10, 'y')) t(document, id)"
    )
    assert [_document(con, "", name) for name in ("7", "x", "9")] == [7, 8, 9]
    for name in ("8", "y"):
        with pytest.raises(InputError, match="several documents"):
            _document(con, "", name)


# --- the commands


def test_the_command_lists_and_runs_and_shows(tiny_index: Path, plain: World) -> None:
    index = str(tiny_index)
    listed = CliRunner().invoke(cli, ["recipes", index])
    assert listed.exit_code == 0
    for recipe in recipes():
        assert recipe.name in listed.stdout
        assert recipe.title in listed.stdout
    sae, feature = plain.picked()[1]
    call = ["recipe", index, "top_contexts", "--param", f"sae={sae}", "--param", f"feature={feature}"]
    done = CliRunner().invoke(cli, [*call, "--limit", "2", "--format", "csv"])
    assert done.exit_code == 0
    assert done.stdout.startswith("sae,feature,rank,")
    shown = CliRunner().invoke(cli, [*call, "--limit", "2", "--show"]).stdout
    script = CliRunner().invoke(cli, ["sql", index, "--script"]).stdout
    anywhere = duckdb.connect()
    *before, last = duckdb.extract_statements(script + shown)
    for one in before:
        anywhere.execute(one)
    assert anywhere.execute(last).fetchall() == [
        tuple(row.values()) for row in plain.ask("top_contexts", sae=sae, feature=feature, limit=2)
    ]


def test_a_time_limit_stops_a_recipe(tiny_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = (
        "SELECT count(*) FROM range(1_000_000_000) a, range(1_000_000_000) b WHERE a.range * b.range = 3"
    )
    monkeypatch.setattr("queries.recipe.statement", lambda con, name, params: endless)
    done = CliRunner().invoke(cli, ["recipe", str(tiny_index), "l0_distribution", "--timeout", "0.2"])
    assert str(done.exception) == "stopped after 0.2 s, its time limit"
    assert done.stdout == ""


def test_words_in_quotes_stay_words(plain: World) -> None:
    for phrase in ("it's $sae", "'; DROP TABLE x; --", "$feature"):
        sql = statement(plain.con, "features_on_phrase", {"phrase": phrase})
        assert len(duckdb.extract_statements(sql)) == 1
        assert plain.ask("features_on_phrase", phrase=phrase) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--param", "density"], "--param density: NAME=VALUE is wanted"),
        (["--param", "limit=2", "--limit", "3"], "--param limit: given twice"),
        (["--param", "limits=2"], "no parameter 'limits'; there are density, sae, limit"),
    ],
)
def test_options_that_say_nothing(tiny_index: Path, options: list[str], match: str) -> None:
    done = CliRunner().invoke(cli, ["recipe", str(tiny_index), "dense_features", *options])
    assert isinstance(done.exception, InputError)
    assert match in str(done.exception)
    assert done.stdout == ""


# --- the page

TINY = {
    "sae": "tiny-res/layer_1/width_37/average_l0_2", "other": "tiny-res/layer_1/width_130/average_l0_13",
    "feature": "2", "document": "0-1", "phrase": "the cat", "column": "score", "value": "10.25",
    "a_to": "5", "b_from": "5",
}  # fmt: skip


def test_the_page_says_what_the_files_say() -> None:
    """Of every recipe its title, its words and what it needs, and an example."""
    page = " ".join(PAGE.split())
    for recipe in recipes():
        assert f"### {recipe.name} {recipe.title}. {' '.join(recipe.words.split())} Needs " in page, (
            recipe.name
        )
        assert f"$ corpuscope recipe out/demo/index {recipe.name} " in page
    assert set(re.findall(r"^### (.*)$", PAGE, re.MULTILINE)) == {recipe.name for recipe in recipes()}


@pytest.mark.parametrize("example", re.findall(r"^```\n\$ (.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_an_example_of_the_page_runs(example: str, tiny_index: Path) -> None:
    """On the tiny index, with names of its own; the columns are those that the page shows."""
    command, header, *_ = example.splitlines()
    words = shlex.split(command)
    assert words[:3] == ["corpuscope", "recipe", "out/demo/index"]
    params = [word if "=" not in word else _on_tiny(word) for word in words[3:]]
    done = CliRunner().invoke(cli, ["recipe", str(tiny_index), *params, "--format", "csv"])
    if header.startswith("error: "):
        assert f"error: {done.exception}" == header
        return
    assert done.exit_code == 0, done.exception
    shown = re.split(r"\s{2,}", header)
    columns = done.stdout.splitlines()[0].split(",")
    whole = shown[:-1] if header.endswith("…") else shown
    assert columns[: len(whole)] == whole
    assert len(whole) == len(columns) or columns[len(whole)].startswith(shown[-1].removesuffix("…"))


def _on_tiny(word: str) -> str:
    name, _, value = word.partition("=")
    return f"{name}={value if value == 'all' else TINY.get(name, value)}"
