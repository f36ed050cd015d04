"""``tuning.database``: what is kept, what is found again, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("tvm", reason="the compiler (extra 'tune') is not installed")

from tq_tvm.schedules import decode
from tvm.s_tir import Schedule

from tq_tvm import schedules
from tq_tvm.artifacts import Manifest
from tq_tvm.build.library import build_library
from tq_tvm.errors import TuningLogError
from tq_tvm.spec import CacheSpec
from tq_tvm.targets import get_target
from tq_tvm.tuning import database
from tq_tvm.tuning.database import (
    Entry,
    Environment,
    entries,
    find_records,
    refile,
    save_record,
    search_workload,
)
from tq_tvm.tuning.workloads import Workload

SPEC = CacheSpec(64, 8, 2, 16, "float32", "bshd")
TARGET = get_target("x86_64")
PAGES = {"batch": 1, "pages": 2, "table_width": 2}
SHAPES = {
    "rotate": {"n": 64},
    "fill_slots": {"tokens": 4, "pages": 2},
    "fill_table": {"tokens": 32, **PAGES},
    "flatten": {"tokens": 32, **PAGES},
    "decode": PAGES,
}
ENVIRONMENT = Environment("a CPU", {"tq_tvm": "0"}, "2026-01-01", 1)
OTHER_HEADS = dataclasses.replace(SPEC, num_q_heads=4)
OTHER_PAGES = dataclasses.replace(SPEC, page_size=32)


def trace_of(function, spec=SPEC, seed=1, shape=None, target=TARGET):
    """A random point of a workload's space."""
    sizes = shape or SHAPES[function]
    sch = Schedule(search_workload(function, spec, target.kind, sizes), seed=seed)
    schedules.space(function, spec, target.kind)(sch)
    return sch.trace


def config_of(function, trace, spec=SPEC):
    return schedules.instantiate(function, spec, TARGET.kind, trace).config


def entry_of(function, trace, spec=SPEC, us=1.0, shape=None) -> Entry:
    workload = Workload(function, spec, shape or SHAPES[function], "a test")
    return Entry(
        workload=workload.label,
        function=function,
        spec=spec.label,
        shape=dict(workload.shape),
        size=workload.size,
        us=us,
        default_us=2 * us,
        search_us=us,
        trials=1,
        failures=0,
        max_error=0.0,
        config=config_of(function, trace, spec),
        environment=ENVIRONMENT,
    )


def save(logs, function, spec=SPEC, seed=1, us=1.0, shape=None) -> Entry:
    trace = trace_of(function, spec, seed, shape)
    entry = entry_of(function, trace, spec, us, shape)
    save_record(entry, trace, TARGET, logs)
    return entry


def found_configs(logs, function, spec=SPEC) -> dict[str, dict[str, int]]:
    """Config of every record that serves a spec, by workload."""
    return {
        r.workload: config_of(function, r.trace, spec)
        for r in find_records(function, spec, TARGET, logs)
    }


def lines(logs, kernel, name) -> int:
    return len((logs / TARGET.name / kernel / name).read_text().splitlines())


# --- saving


@pytest.mark.parametrize("function", SHAPES)
def test_a_record_is_found_again(tmp_path, function):
    trace = trace_of(function, seed=5)
    entry = entry_of(function, trace, us=12.5)
    directory = save_record(entry, trace, TARGET, tmp_path)
    assert directory.parent == tmp_path / TARGET.name
    (record,) = find_records(function, SPEC, TARGET, tmp_path)
    assert (record.workload, record.size, record.us) == (entry.workload, entry.size, 12.5)
    assert config_of(function, record.trace) == entry.config == config_of(function, trace)
    assert entries(directory.name, TARGET, tmp_path) == [entry]
    metadata = msgspec.json.decode((directory.parent / "metadata.json").read_bytes())
    assert metadata == {"target": TARGET.name, "arch": TARGET.arch}


def test_nothing_is_found_where_there_is_no_log(tmp_path):
    assert find_records("rotate", SPEC, TARGET, tmp_path) == []
    assert entries("rotate", TARGET, tmp_path) == []
    save(tmp_path, "fill_slots")
    assert find_records("rotate", SPEC, TARGET, tmp_path) == []
    assert find_records("fill_table", SPEC, TARGET, tmp_path) == []
    assert find_records("fill_slots", SPEC, get_target("x86_64_v3"), tmp_path) == []


def test_workloads_of_a_kernel_are_merged(tmp_path):
    """In any order, with records of other kernels left alone."""
    saved = [
        save(tmp_path, "fill_table", seed=1),
        save(tmp_path, "rotate", seed=2),
        save(tmp_path, "fill_slots", seed=3),
        save(tmp_path, "fill_slots", seed=4, shape={"tokens": 32, "pages": 2}),
        save(tmp_path, "rotate", seed=5, shape={"n": 128}),
    ]
    for function, count in (("fill_table", 1), ("fill_slots", 2), ("rotate", 2)):
        want = {e.workload: e.config for e in saved if e.function == function}
        assert len(want) == count
        assert found_configs(tmp_path, function) == want
    for kernel, count in (("fill", 3), ("rotate", 2)):
        assert lines(tmp_path, kernel, "database_workload.json") == count
        assert lines(tmp_path, kernel, "database_tuning_record.json") == count
        summary = json.loads((tmp_path / TARGET.name / kernel / "summary.json").read_text())
        names = [item["workload"] for item in summary]
        assert names == sorted(names)
    # Nothing is left of the exchange of folders.
    left = {p.name for p in (tmp_path / TARGET.name).iterdir()} - {".lock"}
    assert left == {"fill", "rotate", "metadata.json"}


def test_a_newer_record_replaces_the_older_one(tmp_path):
    """Also one that is slower: it was measured against the kernel as it is now."""
    kept = save(tmp_path, "fill_slots", seed=3)
    old = save(tmp_path, "fill_table", seed=1, us=1.0)
    seeds = iter(range(2, 50))
    newer = old
    while newer.config == old.config:
        newer = entry_of("fill_table", trace := trace_of("fill_table", seed=next(seeds)), us=3.0)
    save_record(newer, trace, TARGET, tmp_path)
    (record,) = find_records("fill_table", SPEC, TARGET, tmp_path)
    assert record.us == 3.0
    assert found_configs(tmp_path, "fill_table") == {newer.workload: newer.config}
    assert found_configs(tmp_path, "fill_slots") == {kept.workload: kept.config}
    assert lines(tmp_path, "fill", "database_tuning_record.json") == 2


def test_an_older_record_keeps_its_environment(tmp_path):
    """A save tells of itself alone."""
    old = save(tmp_path, "fill_slots", seed=3)
    trace = trace_of("fill_table")
    environment = Environment("another CPU", {"tq_tvm": "1"}, "2027-01-01", 2)
    new = msgspec.structs.replace(entry_of("fill_table", trace), environment=environment)
    save_record(new, trace, TARGET, tmp_path)
    assert entries("fill", TARGET, tmp_path) == [old, new]
    assert old.environment == ENVIRONMENT


def test_logs_name_no_path_of_this_machine(tmp_path):
    for function in SHAPES:
        save(tmp_path, function)
    here = str(Path(__file__).resolve().parents[2])
    for path in tmp_path.rglob("*.json"):
        assert here not in path.read_text(), path


def test_a_record_of_the_default_is_no_tuned_variant(tmp_path):
    """In the manifest it has the record's label all the same."""
    for function, tuned in (("rotate", False), ("fill_slots", True)):
        sch = Schedule(search_workload(function, SPEC, TARGET.kind, SHAPES[function]), seed=1)
        point = schedules.space if tuned else schedules.default
        point(function, SPEC, TARGET.kind)(sch)
        save_record(entry_of(function, sch.trace), sch.trace, TARGET, tmp_path)
    functions = Manifest.read(
        build_library(SPEC, TARGET, tmp_path / "artifacts", logs=tmp_path)
    ).functions
    of_records = {
        name: [v for v in functions[name] if v.workload is not None] for name in functions
    }
    assert {name: [v.tuned for v in found] for name, found in of_records.items()} == {
        **{name: [] for name in functions},
        "rotate": [False],
        "fill_slots": [True],
    }
    assert not any(v.tuned for found in functions.values() for v in found if v.workload is None)


# --- where


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package's logs outside of a clone; (its logs, those of this user)."""
    packaged = tmp_path / "site-packages" / "tq_tvm" / "tuning_logs"
    packaged.mkdir(parents=True)
    monkeypatch.setattr(database, "logs_root", lambda: packaged)
    monkeypatch.setenv("TQ_TVM_CACHE_DIR", str(tmp_path / "user"))
    return packaged, tmp_path / "user" / "tuning_logs"


def test_an_installed_package_is_not_written_to(installed):
    packaged, user = installed
    entry = save(None, "rotate")
    assert not list(packaged.iterdir())
    assert entries("rotate", TARGET, user) == [entry]
    assert [r.workload for r in find_records("rotate", SPEC, TARGET)] == [entry.workload]


def test_a_clone_is_written_to(installed):
    packaged, user = installed
    (packaged.parent / "pyproject.toml").touch()
    entry = save(None, "rotate")
    assert entries("rotate", TARGET, packaged) == [entry]
    assert not user.exists()


def test_a_clone_that_is_read_only(installed, monkeypatch):
    packaged, user = installed
    (packaged.parent / "pyproject.toml").touch()
    monkeypatch.setattr(database.os, "access", lambda path, mode: path != packaged)
    save(None, "rotate")
    assert not list(packaged.iterdir()) and user.exists()


def test_records_of_the_user_come_before_those_of_the_package(installed):
    """For the workloads that they are of; the package's others stay."""
    packaged, user = installed
    for n in (64, 128):
        save(packaged, "rotate", us=1.0, shape={"n": n})
    save(user, "rotate", us=2.0, shape={"n": 128})
    save(user, "rotate", us=3.0, shape={"n": 256})
    found = {r.workload.split("-")[1]: r.us for r in find_records("rotate", SPEC, TARGET)}
    assert found == {"n64": 1.0, "n128": 2.0, "n256": 3.0}


# --- which spec a record serves


def test_query_heads_matter_to_decode_alone(tmp_path):
    own, others = {}, {}
    for function in SHAPES:
        own[function] = save(tmp_path, function, seed=1).workload
        if function == "decode":
            others[function] = save(tmp_path, function, OTHER_HEADS, seed=2).workload
    for function in SHAPES:
        assert list(found_configs(tmp_path, function)) == [own[function]]
        want = others.get(function, own[function])
        assert list(found_configs(tmp_path, function, OTHER_HEADS)) == [want]


@pytest.mark.parametrize("function", SHAPES)
def test_decisions_carry_over_to_specs_that_differ_in_addresses(tmp_path, function):
    entry = save(tmp_path, function)
    for change in (
        {"num_q_heads": 4, "num_kv_heads": 1},
        {"num_q_heads": 16, "num_kv_heads": 4},
        {"page_size": 32},
        {"layout": "bhsd"},
    ):
        assert found_configs(tmp_path, function, dataclasses.replace(SPEC, **change)) == {
            entry.workload: entry.config
        }


@pytest.mark.parametrize("function", SHAPES)
def test_the_group_matters_to_decode_alone(tmp_path, function):
    entry = save(tmp_path, function)
    want = {} if function == "decode" else {entry.workload: entry.config}
    assert found_configs(tmp_path, function, dataclasses.replace(SPEC, num_q_heads=4)) == want


@pytest.mark.parametrize("function", SHAPES)
@pytest.mark.parametrize("change", [{"head_dim": 128}, {"dtype": "bfloat16"}], ids=str)
def test_but_not_to_other_rows(tmp_path, function, change):
    save(tmp_path, function)
    assert find_records(function, dataclasses.replace(SPEC, **change), TARGET, tmp_path) == []


@pytest.mark.parametrize("function", ["fill_slots", "decode"])
def test_records_of_the_spec_itself_come_first(tmp_path, function):
    """And those of one other spec otherwise, never a mixture."""
    both = {"fill_slots": {"tokens": 8, "pages": 2}, "decode": {**PAGES, "pages": 4}}[function]
    mine = {
        save(tmp_path, function, OTHER_PAGES).workload,
        save(tmp_path, function, OTHER_PAGES, shape=both).workload,
    }
    theirs = {save(tmp_path, function).workload, save(tmp_path, function, shape=both).workload}
    assert set(found_configs(tmp_path, function, OTHER_PAGES)) == mine
    assert set(found_configs(tmp_path, function, SPEC)) == theirs
    third = dataclasses.replace(SPEC, page_size=64)
    assert set(found_configs(tmp_path, function, third)) in (mine, theirs)


# --- what is refused


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def damage(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_the_log_of_another_target(tmp_path):
    save(tmp_path, "rotate")
    other = get_target("x86_64_v3")
    (tmp_path / TARGET.name).rename(tmp_path / other.name)
    with pytest.raises(TuningLogError, match="must hold records of x86_64_v3, got records of x86"):
        find_records("rotate", SPEC, other, tmp_path)


@pytest.mark.parametrize("function", ["rotate", "fill_slots"])
def test_the_log_of_another_target_is_not_written(tmp_path, function):
    """Not by a kernel that it has no records of either: all its records would pass for ours."""
    save(tmp_path, "rotate")
    other = get_target("x86_64_v3")
    root = (tmp_path / TARGET.name).rename(tmp_path / other.name)
    before = contents(root)
    trace = trace_of(function)
    with pytest.raises(TuningLogError, match="must hold records of x86_64_v3, got records of x86"):
        save_record(entry_of(function, trace), trace, other, tmp_path)
    assert contents(root) == before


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[{",
        b"{}",
        b"[1]",
        b'[{"workload": "x"}]',
        b"\xff\xfe",
        b"null",
    ],
)
def test_a_malformed_summary(tmp_path, text):
    save(tmp_path, "rotate")
    path = tmp_path / TARGET.name / "rotate" / "summary.json"
    path.write_bytes(text)
    with pytest.raises(TuningLogError, match=r"summary\.json must be a readable.*tune") as error:
        find_records("rotate", SPEC, TARGET, tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["us", "config", "workload"])
def test_a_summary_with_a_field_of_another_type(tmp_path, name):
    save(tmp_path, "rotate")
    path = tmp_path / TARGET.name / "rotate" / "summary.json"
    damage(path, lambda items: [{**item, name: []} for item in items])
    with pytest.raises(TuningLogError, match=r"summary\.json must be a readable"):
        find_records("rotate", SPEC, TARGET, tmp_path)


@pytest.mark.parametrize("text", [None, b"", b'{"target": 1}'])
def test_malformed_metadata(tmp_path, text):
    save(tmp_path, "rotate")
    path = tmp_path / TARGET.name / "metadata.json"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text)
    with pytest.raises(TuningLogError, match=r"metadata\.json must be a readable"):
        find_records("rotate", SPEC, TARGET, tmp_path)


@pytest.mark.parametrize("function", ["rotate", "decode"])
def test_a_record_of_another_kernel_than_todays(tmp_path, function):
    """The summary names a workload whose module is not the one in the database."""
    save(tmp_path, function)
    path = tmp_path / TARGET.name / function / "summary.json"
    key = next(iter(SHAPES[function]))
    damage(path, lambda items: [{**i, "shape": {**i["shape"], key: 7}} for i in items])
    with pytest.raises(
        TuningLogError, match=f"got none for the kernel as it is now.*--kernel {function}"
    ):
        find_records(function, SPEC, TARGET, tmp_path)


def test_a_record_of_a_decode_that_was_rewritten(tmp_path, monkeypatch):
    """Its factory makes another kernel of the same decisions."""
    entry = save(tmp_path, "decode")
    factory = decode.decode

    def rewritten(spec, kind, point):
        return factory(spec, kind, point).with_attr("rewritten", 1)

    monkeypatch.setattr(decode, "decode", rewritten)
    with pytest.raises(TuningLogError, match=f"{entry.workload}, got none for the kernel as it is"):
        find_records("decode", SPEC, TARGET, tmp_path)


def test_decisions_outlive_a_change_of_their_kernel(tmp_path, monkeypatch):
    """Filed again, they are found; times are not, and a new record takes their place."""
    entry = save(tmp_path, "decode")
    factory = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *point: factory(*point).with_attr("rewritten", 1))
    (refiled,) = refile("decode", TARGET, tmp_path)
    assert refiled == msgspec.structs.replace(entry, refiled=True)
    assert entries("decode", TARGET, tmp_path) == [refiled]
    (record,) = find_records("decode", SPEC, TARGET, tmp_path)
    assert config_of("decode", record.trace) == entry.config and record.us is None
    assert refile("decode", TARGET, tmp_path) == []
    newer = save(tmp_path, "decode", seed=2)
    assert entries("decode", TARGET, tmp_path) == [newer] and not newer.refiled


def test_decisions_that_are_gone_are_not_filed_again(tmp_path, monkeypatch):
    entry = save(tmp_path, "decode")
    factory = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *point: factory(*point).with_attr("rewritten", 1))
    path = tmp_path / TARGET.name / "decode" / "summary.json"
    damage(path, lambda items: [{**i, "config": {**i["config"], "tile": 7}} for i in items])
    before = path.read_bytes()
    with pytest.raises(TuningLogError, match=f"decisions of {entry.workload} must be on offer"):
        refile("decode", TARGET, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("slower", [0.0, 1.0])
def test_a_record_of_an_older_default_is_dropped(tmp_path, slower, caplog):
    """Than which nothing was faster; of what was, the decisions are kept."""
    entry = save(tmp_path, "decode")
    path = tmp_path / TARGET.name / "decode" / "summary.json"
    damage(path, lambda items: [{**i, "default_us": i["us"] + slower} for i in items])
    (found,) = entries("decode", TARGET, tmp_path)
    assert found.config != schedules.instantiate("decode", SPEC, TARGET.kind, None, None).config
    refile("decode", TARGET, tmp_path)
    kept = [e.workload for e in entries("decode", TARGET, tmp_path)]
    assert kept == ([entry.workload] if slower else [])
    assert ("is of an older default" in caplog.text) == (slower == 0)


def test_nothing_is_filed_again_where_there_is_no_log(tmp_path):
    assert refile("decode", TARGET, tmp_path) == []


def test_a_stale_record_of_another_workload_is_dropped(tmp_path, caplog):
    """So that the command that the error advises works."""
    kept = save(tmp_path, "fill_slots", seed=3)
    stale = save(tmp_path, "fill_slots", seed=4, shape={"tokens": 32, "pages": 2})
    path = tmp_path / TARGET.name / "fill" / "summary.json"
    damage(
        path,
        lambda items: [
            {**i, "shape": {**i["shape"], "pages": 7}} if i["workload"] == stale.workload else i
            for i in items
        ],
    )
    with pytest.raises(TuningLogError, match=stale.workload):
        find_records("fill_slots", SPEC, TARGET, tmp_path)
    table = save(tmp_path, "fill_table", seed=1)
    assert stale.workload in caplog.text and kept.workload not in caplog.text
    assert found_configs(tmp_path, "fill_slots") == {kept.workload: kept.config}
    assert found_configs(tmp_path, "fill_table") == {table.workload: table.config}
    assert lines(tmp_path, "fill", "database_tuning_record.json") == 2


@pytest.mark.parametrize("name", ["database_workload.json", "database_tuning_record.json"])
@pytest.mark.parametrize("text", [None, b"garbage", b"\xff{{{", b"[1]", b"cut"])
def test_a_malformed_database(tmp_path, name, text):
    """Told by what reads it; what writes leaves it as it is."""
    save(tmp_path, "rotate")
    path = tmp_path / TARGET.name / "rotate" / name
    if text is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if text == b"cut" else text)
    before = contents(tmp_path)
    wanted = (
        rf"{path.parent} must hold a readable database_.*; restore it, or remove .* tune` again"
    )
    with pytest.raises(TuningLogError, match=wanted):
        find_records("rotate", SPEC, TARGET, tmp_path)
    trace = trace_of("rotate")
    with pytest.raises(TuningLogError, match=wanted):
        save_record(entry_of("rotate", trace), trace, TARGET, tmp_path)
    assert contents(tmp_path) == before


def test_a_trace_that_does_not_replay(tmp_path):
    """A space had one more decision when the record was made."""
    sch = Schedule(search_workload("rotate", SPEC, TARGET.kind, SHAPES["rotate"]), seed=1)
    schedules.space("rotate", SPEC, TARGET.kind)(sch)
    entry = entry_of("rotate", sch.trace)
    sch.sample_categorical([1, 2], [0.5, 0.5])
    save_record(entry, sch.trace, TARGET, tmp_path)
    with pytest.raises(TuningLogError, match=r"record rotate-.* must replay on .*--no-records"):
        build_library(SPEC, TARGET, tmp_path / "artifacts", logs=tmp_path)
    assert not (tmp_path / "artifacts").exists()
