"""Spec files: what is wrong is one line that names the key; paths are relative to the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.specfile import load_spec
from sae_runtime.errors import InputError

BASE: dict[str, Any] = {
    "corpus": {"uri": "data/*.jsonl", "metadata": ["lang"]},
    "model": {"uri": "model"},
    "saes": [{"uri": "suites/tiny-res"}],
    "index": "out/index",
}


def edited(place: str, value: Any) -> dict[str, Any]:
    """BASE with `value` at a dotted place, in which `saes.0` is the first entry."""
    spec = copy.deepcopy(BASE)
    target: Any = spec
    *folders, last = place.split(".")
    for part in folders:
        target = target[int(part)] if part.isdigit() else target.setdefault(part, {})
    target[last] = value
    return spec


def problem(folder: Path, spec: Any) -> str:
    """The message of the InputError that a spec gives: one line that begins with the file."""
    file = folder / "s.yaml"
    file.write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_spec(str(file))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(file))
    return message.removeprefix(str(file)).removeprefix(": ")


@pytest.mark.parametrize(
    ("place", "near"),
    [
        ("contxt", "context"),
        ("corpus.texts", "text"),
        ("model.dtyp", "dtype"),
        ("saes.0.selct", "select"),
        ("context.lenght", "length"),
    ],
)
def test_an_unknown_key_is_named_with_the_key_that_is_meant(tmp_path: Path, place: str, near: str) -> None:
    message = problem(tmp_path, edited(place, 1))
    key = place.replace("corpus.", "corpus[0].").replace("saes.0", "saes[0]")
    assert message == f"{key}: unknown key; did you mean {near!r}?"


def test_an_unknown_key_far_from_all_lists_what_is_known(tmp_path: Path) -> None:
    assert problem(tmp_path, edited("model.zzz", 1)) == (
        "model.zzz: unknown key; known are uri, revision, dtype, device, threads, attention, mixed_devices"
    )


def test_an_unknown_key_inside_keep_is_found_though_keep_is_a_union(tmp_path: Path) -> None:
    message = problem(tmp_path, edited("saes.0.keep", {"sampl": 0.1}))
    assert message.startswith("saes[0].keep.sampl: unknown key; did you mean 'sample'?")


def test_a_misspelt_key_is_named_before_the_key_that_is_missing_for_it(tmp_path: Path) -> None:
    spec = copy.deepcopy(BASE)
    spec["modle"] = spec.pop("model")
    assert problem(tmp_path, spec) == "modle: unknown key; did you mean 'model'? (and 1 more)"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("context.length", "abc", "context.length: a whole number is wanted (given: 'abc')"),
        ("context.length", True, "context.length: a whole number is wanted (given: true)"),
        ("context.length", 64.5, "context.length: a whole number is wanted (given: 64.5)"),
        ("context.length", 1, "context.length: a number of 2 or more is wanted (given: 1)"),
        ("context.bos", "yes please", "context.bos: auto or true or false is wanted (given: 'yes please')"),
        ("context.exclude", "first", "context.exclude: a list is wanted (given: 'first')"),
        (
            "context.exclude",
            ["x"],
            "context.exclude[0]: special, template, first or a mapping with the keys norm_above, roles is "
            "wanted (given: 'x')",
        ),
        (
            "context.exclude",
            ["special", {"norm_above": 0.5}],
            "context.exclude[1].norm_above: a number of more than 1.0 is wanted (given: 0.5)",
        ),
        ("top_k", -1, "top_k: a number of more than 0 is wanted (given: -1)"),
        ("top_k", None, "top_k: a whole number is wanted (given: null)"),
        ("sample_k", "many", "sample_k: a whole number is wanted (given: 'many')"),
        ("corpus.sample", 2, "corpus[0].sample: a number of 1.0 or less is wanted (given: 2)"),
        ("corpus.sample", True, "corpus[0].sample: a number is wanted (given: true)"),
        ("corpus.sample", {"sample": 2}, "corpus[0].sample: a number is wanted (given: {'sample': 2})"),
        ("corpus.limit", 0, "corpus[0].limit: a number of more than 0 is wanted (given: 0)"),
        ("corpus.uri", [], "corpus[0].uri: a list of at least one is wanted (given: ())"),
        ("corpus.uri", 3, "corpus[0].uri[0]: text is wanted (given: 3)"),
        ("corpus.metadata", "n", "corpus[0].metadata: a list is wanted (given: 'n')"),
        ("saes.0.keep", {"sample": 2}, "saes[0].keep.sample: a number of 1.0 or less is wanted (given: 2)"),
        ("saes.0.keep", {"sample": True}, "saes[0].keep.sample: a number is wanted (given: true)"),
        ("model.dtype", "fp8", "model.dtype: float32, bfloat16, float16 is wanted (given: 'fp8')"),
        ("model.threads", 0, "model.threads: a number of more than 0 is wanted (given: 0)"),
        ("max_index_bytes", "many", "max_index_bytes: a size such as 500MB or 1TB is wanted"),
        ("index", 5, "index: text is wanted (given: 5)"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_is_wanted(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    assert problem(tmp_path, edited(place, value)) == message


def test_keep_lists_its_words_and_its_mapping(tmp_path: Path) -> None:
    assert problem(tmp_path, edited("saes.0.keep", "sometimes")) == (
        "saes[0].keep: tokens, documents, none or a mapping with the key sample is wanted "
        "(given: 'sometimes')"
    )


def test_a_string_for_a_mapping_names_the_mappings_keys(tmp_path: Path) -> None:
    message = problem(tmp_path, edited("corpus", "data/*.jsonl"))
    assert message.startswith("corpus[0]: a mapping with the keys uri, name, format, text,")


@pytest.mark.parametrize("key", ["corpus", "model", "saes", "index"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert problem(tmp_path, {k: v for k, v in BASE.items() if k != key}) == f"{key}: this key is missing"


def test_several_problems_are_counted(tmp_path: Path) -> None:
    assert problem(tmp_path, BASE | {"top_k": -1, "sample_k": 0}).endswith("(given: -1) (and 1 more)")


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("corpus.template", "chat.jinja", "corpus[0]: `template` is for conversations; give their column"),
        ("corpus", {"uri": "a", "text": "t", "messages": "m"}, "corpus[0]: `text` and `messages` are both"),
        ("corpus.messages", 3, "corpus[0].messages: text is wanted (given: 3)"),
        ("context.exclude", [{}], "context.exclude[0]: norm_above or roles is wanted"),
        ("context.exclude", [{"roles": []}], "context.exclude[0].roles: a list of at least one is wanted"),
        (
            "context.exclude",
            [{"rolls": "system"}],
            "context.exclude[0].rolls: unknown key; did you mean 'roles'?",
        ),
        (
            "context.exclude",
            ["roles"],
            "context.exclude[0]: special, template, first or a mapping with the keys",
        ),
    ],
)
def test_conversations_and_exclusions_that_make_no_sense(
    tmp_path: Path, place: str, value: Any, what: str
) -> None:
    assert what in problem(tmp_path, edited(place, value))


def test_metadata_columns_that_sql_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    assert "'lang' is listed twice" in problem(tmp_path, edited("corpus.metadata", ["lang", "lang"]))
    assert "one name to SQL" in problem(tmp_path, edited("corpus.metadata", ["lang", "Lang"]))
    sources = [{"uri": "a.jsonl", "metadata": ["lang"]}, {"uri": "b.jsonl", "metadata": ["Lang"]}]
    assert "one name to SQL" in problem(tmp_path, edited("corpus", sources))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the spec is empty; it needs the keys corpus, model, saes and index"),
        ("# nothing\n", "the spec is empty; it needs the keys corpus, model, saes and index"),
        ("- a\n", "a spec is a mapping with the keys corpus, model, saes,"),
        ("hello", "a spec is a mapping with the keys corpus, model, saes,"),
        ("corpus: [\nmodel: {a\n", " line 3: not a spec in YAML: expected ',' or '}'"),
        ("corpus:\n\turi: x\n", " line 2: not a spec in YAML: found character '\\t'"),
        ("index: a\nindex: b\n", " line 2: not a spec in YAML: the key 'index' is given twice"),
        ("model: {uri: a, uri: b}\n", " line 1: not a spec in YAML: the key 'uri' is given twice"),
        ("index: !!python/object/apply:os.system [ls]\n", " line 1: not a spec in YAML: the tag !!python/"),
        ("\x00", "not a spec in YAML: unacceptable character #x0000"),
    ],
)
def test_text_that_is_no_spec(tmp_path: Path, text: str, message: str) -> None:
    assert problem(tmp_path, text).startswith(message)


def test_a_spec_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, why in [
        (tmp_path / "no.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (binary, "it is not UTF-8 text"),
    ]:
        with pytest.raises(InputError) as caught:
            load_spec(str(path))
        assert str(caught.value) == f"{path}: cannot read the spec: {why}"


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    spec = yaml.safe_dump({k: v for k, v in BASE.items() if k != "saes"})
    file = tmp_path / "s.yaml"
    file.write_text(spec + "saes:\n- &one {uri: suites/a-res, keep: none}\n- {<<: *one, uri: suites/b-res}\n")
    loaded, _ = load_spec(str(file))
    assert [entry.keep for entry in loaded.saes] == ["none", "none"]
    assert loaded.saes[1].uri == str(tmp_path / "suites/b-res")


def test_relative_paths_are_relative_to_the_specs_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "specs" / "model").mkdir(parents=True)
    (tmp_path / "specs" / "s.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(tmp_path)
    loaded, text = load_spec("specs/s.yaml")
    folder = tmp_path / "specs"
    assert loaded.corpus[0].uri == (str(folder / "data/*.jsonl"),)
    assert loaded.model.uri == str(folder / "model")
    assert loaded.saes[0].uri == str(folder / "suites/tiny-res")
    assert loaded.index == str(folder / "out/index")
    assert yaml.safe_load(text) == BASE
    assert load_spec("specs/s.yaml", "here")[0].index == str(tmp_path / "here")  # as a shell means it
    assert load_spec("specs/s.yaml", "memory://x")[0].index == "memory://x"


def test_uris_with_a_scheme_and_hub_ids_are_left_alone(tmp_path: Path) -> None:
    spec = edited("model.uri", "HuggingFaceTB/SmolLM2-135M")
    spec["corpus"]["uri"] = ["s3://bucket/*.jsonl", "/data/a.jsonl"]
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(spec))
    loaded, _ = load_spec(str(file))
    assert loaded.model.uri == "HuggingFaceTB/SmolLM2-135M"
    assert loaded.corpus[0].uri == ("s3://bucket/*.jsonl", "/data/a.jsonl")


@pytest.mark.parametrize(
    ("given", "wanted"), [("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), (1000, 1000), ("1TB", 10**12)]
)
def test_sizes(tmp_path: Path, given: Any, wanted: int) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(BASE | {"max_index_bytes": given}))
    assert load_spec(str(file))[0].max_index_bytes == wanted
