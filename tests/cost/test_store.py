"""Profiles on disk: the same numbers back, one message for a file that cannot be used, never an exception from it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from moec.cost import ProfileError, ProfileWarning, load_profile, machine_for, save_profile
from moec.cost.links import Link
from moec.cost.store import fingerprint, from_json, profile_path, to_json
from moec.targets import parse_target
from tests.cost.machines import overhead, round_machine


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("MOEC_CACHE_DIR", str(folder))


def here() -> dict[str, object]:
    return {"fingerprint": fingerprint()}


def test_round_trip() -> None:
    machine = round_machine(
        interrupted=0.25,
        measured="today",
        overheads=(overhead(rows=((1, 1e-10),)),),
        links=((2, Link(1e-4, 2e9)), (8, Link(2e-4, 1e9))),
    )
    assert dataclasses.asdict(from_json(to_json(machine))) == dataclasses.asdict(machine)


def test_a_profile_from_before_links_were_measured() -> None:
    assert from_json(without("links_between_processes")).links == ()


def test_saved_and_loaded_by_processor() -> None:
    assert load_profile() is None
    path = save_profile(round_machine(**here()))
    assert path == profile_path()
    assert fingerprint() in path.name
    found = load_profile()
    assert found is not None
    assert found.name == "round"
    assert machine_for(parse_target("cpu")).name == "round"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_another_machines_target_gets_defaults() -> None:
    save_profile(round_machine(**here()))
    assert machine_for(parse_target("cpu,cores=1234")).name == "cpu"
    assert machine_for(parse_target("cpu:neon")).name in ("cpu:neon", "round")


def changed(**fields: object) -> str:
    data = json.loads(to_json(round_machine(**here())))
    data["machine"].update(fields)
    return json.dumps(data)


def without(field: str) -> str:
    data = json.loads(changed())
    del data["machine"][field]
    return json.dumps(data)


CURVE = {"dtype": "bf16", "isa": "avx2", "threads": 1}
BAD = {
    "is not JSON": to_json(round_machine())[:-40],
    "is no moec-profile": "[1, 2]",
    "has version 99, and version 2 is read": json.dumps({"format": "moec-profile", "version": 99}),
    "lacks 'machine'": json.dumps({"format": "moec-profile", "version": 2}),
    "another processor": changed(fingerprint="f" * 16),
    "'fast' ": changed(call_seconds="fast "),
    "NaN": changed(call_seconds=float("nan")),
    "-1": changed(overheads_by_threads=[{"dtype": "bf16", "task_seconds": [[1, -1]], "row_byte_seconds": [[1, 0]]}]),
    "'overheads_by_threads'": without("overheads_by_threads"),
    "[] where something belongs": changed(overheads_by_threads=[]),
    "is no curve": changed(bandwidth_bytes_per_s_by_threads=[]),
    "[[1, 2.0], [2, 1.0]] is no curve": changed(
        gemm_ns_per_weight_element_by_rows=[{**CURVE, "points": [[1, 2.0], [2, 1.0]]}]
    ),
    "element type 'f7'": changed(gemm_ns_per_weight_element_by_rows=[{**CURVE, "dtype": "f7", "points": [[1, 2.0]]}]),
}


@pytest.mark.parametrize("reason", BAD)
def test_an_unusable_file_is_told_of_once_and_ignored(reason: str) -> None:
    path = profile_path()
    path.parent.mkdir(mode=0o700)
    path.write_text(BAD[reason])
    with pytest.warns(ProfileWarning) as told:
        assert load_profile() is None
    assert len(told) == 1
    text = str(told[0].message)
    assert str(path) in text
    assert "moec profile" in text
    if reason not in ("NaN", "'fast' "):
        assert reason in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_profile() is None
        assert machine_for(parse_target("cpu")).name == "cpu"


def test_a_named_file_must_be_usable(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(ProfileError, match="there is no profile"):
        load_profile(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="cannot be used"):
        load_profile(path)
    save_profile(round_machine(), path)  # of any processor
    found = load_profile(path)
    assert found is not None
    assert found.name == "round"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ProfileError, match="cannot be written"):
        save_profile(round_machine(), blocker / "p.json")
