"""Bad adapter files, bad run folders, bad disks: each row of the list of faults has its test, with its number."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbiscuit.rundir import (
    RunDir,
    atomic_write,
    check_space,
    expected_of,
    read_weights,
    run_path,
    sha256_of,
    uninterrupted,
    write_weights,
)
from fedbiscuit.types import ConfigError, EnvironmentFault, FedbiscuitError, IntegrityError, Weights

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def adapter(start: float = 0.0) -> Weights:
    return {"lora_A": torch.arange(6.0).reshape(2, 3) + start, "lora_B": torch.ones(4, 2, dtype=torch.bfloat16)}


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


# Adapter files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "0 bytes, cut off or empty"),
        (lambda data: data[:5], "5 bytes, cut off"),
        (lambda data: data[:40], "cut off inside the header"),
        (lambda data: data[:-1], "cut off: 39 of 40 bytes of data"),
        (lambda data: data + b"\0", "1 bytes too many at its end"),
    ],
)
def test_fault_49_an_empty_truncated_or_too_long_file_is_named_with_a_next_step(
    path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    write_weights(path, adapter(), {})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(IntegrityError, match=rf"adapter_model.safetensors: {words}.*take it from a backup"):
        read_weights(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200_000_000, 2**20 + 1])
def test_fault_50_a_header_that_claims_too_much_is_refused(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(IntegrityError, match=rf"its header claims {length} bytes"):
        read_weights(path)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "b: overlaps the tensor before it"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "b: leaves a gap after the tensor"),
        ({"a": entry([2**62, 8], 0, 8)}, 8, r"a: shape .* does not fit bytes 0 to 8"),
        ({"a": entry([2], 8, 0)}, 8, "does not fit"),
        ({"a": entry([2**64], 0, 8)}, 8, "make no sense"),
        ({"a": entry([-2], 0, 8)}, 8, "make no sense"),
        ({"a": entry([2.0], 0, 8)}, 8, "make no sense"),  # type: ignore[list-item]
        ({"a": entry([True], 0, 4)}, 4, "make no sense"),
        ({"a": entry([1] * 9, 0, 4)}, 4, "make no sense"),
        ({"a": entry([2], 0, 8, "F8_E5M2")}, 8, "dtype 'F8_E5M2' is not read"),
        ({"a": entry([2], 0, 8, ["F32"])}, 8, "is not read"),  # type: ignore[arg-type]
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "must have dtype, shape and data_offsets"),
        ({"a": 3}, 8, "must have dtype"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__: not a table of texts"),
        ([1], 0, "the header is not a table"),
        (b"{", 0, "the header cannot be read"),
        (b"\xff{}", 0, "the header cannot be read"),
        (b'{"a": NaN}', 0, "the header cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "the header cannot be read"),
        (b"[" * 200_000, 0, "the header cannot be read"),
    ],
)
def test_fault_51_a_header_that_makes_no_sense_is_refused(path: Path, header: object, data: int, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        read_weights(raw_file(path, header, bytes(data)))


def test_fault_52_every_flipped_byte_of_an_adapter_is_seen_or_harmless(path: Path) -> None:
    write_weights(path, adapter(), {})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(IntegrityError):
            read_weights(path, sealed=True)
        if position >= header:
            with pytest.raises(IntegrityError, match="bytes were changed after writing"):
                read_weights(path)


def test_fault_53_a_name_that_occurs_twice_is_refused(path: Path) -> None:
    one = json.dumps(entry([2], 0, 8))
    raw_file(path, f'{{"lora_A": {one}, "lora_A": {one}}}'.encode(), bytes(8))
    with pytest.raises(IntegrityError, match="lora_A: this name occurs twice"):
        read_weights(path)


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 2), (-float("inf"), 1)])
def test_fault_54_numbers_that_are_not_finite_are_counted_and_located(path: Path, value: float, count: int) -> None:
    numbers = np.zeros((2, 3), dtype="<f4")
    numbers.reshape(-1)[6 - count :] = value
    raw_file(path, {"lora_A": entry([2, 3], 0, 24)}, numbers.tobytes())
    with pytest.raises(
        IntegrityError, match=rf"lora_A: {count} value.* NaN or infinite, the first at \(1, {3 - count}\)"
    ):
        read_weights(path)
    weights = {"lora_A": torch.from_numpy(numbers)}
    (path.parent / "new").mkdir()
    with pytest.raises(IntegrityError, match=r"lora_A: .*nothing was written.*smaller learning rate"):
        write_weights(path.parent / "new" / path.name, weights, {})
    assert os.listdir(path.parent / "new") == []


def test_fault_55_a_tensor_without_numbers_is_refused(path: Path) -> None:
    raw_file(path, {"lora_A": entry([0, 3], 0, 0)})
    with pytest.raises(IntegrityError, match=r"lora_A: shape \(0, 3\) has no numbers"):
        read_weights(path)
    with pytest.raises(IntegrityError, match=r"lora_A: shape \(0, 3\) has no numbers"):
        write_weights(path, {"lora_A": torch.zeros(0, 3)}, {})


def test_fault_56_transposed_sliced_expanded_and_shared_tensors_are_saved_as_they_look(path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    weights = {"t": base.T, "slice": base[:, ::2], "expand": torch.ones(1).expand(3), "same": base, "zero": base[0, 1]}
    write_weights(path, weights, {})
    back = read_weights(path)
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    back["t"].zero_()
    assert torch.equal(back["same"], base)


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.npz", "x.safetensors"])
def test_fault_57_and_58_a_pickle_or_npz_is_never_opened_whatever_its_name(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "it-ran"),))

    path = tmp_path / name
    for write in (
        lambda: path.write_bytes(pickle.dumps({"a": Bomb()})),
        lambda: torch.save({"a": Bomb()}, path),
        lambda: np.savez_compressed(path.open("wb"), a=np.zeros(10**6)),
    ):
        write()
        with pytest.raises(IntegrityError, match=r"a pickle or zip archive|only .safetensors is read"):
            read_weights(path)
    assert not (tmp_path / "it-ran").exists()


def test_fault_57_an_adapter_folder_with_only_a_pickle_says_so(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        (run.path / "policy").mkdir()
        torch.save({}, run.path / "policy" / "adapter_model.bin")
        with pytest.raises(IntegrityError, match=r"holds only adapter_model.bin, a pickle, which is not opened"):
            run.load_adapter("policy")


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"lora_A": torch.zeros(4, 3), "lora_B": adapter()["lora_B"]}, r"lora_A: shape \(2, 3\), expected \(4, 3\)"),
        ({"lora_A": torch.zeros(3, 2), "lora_B": adapter()["lora_B"]}, r"lora_A: shape \(2, 3\), expected \(3, 2\)"),
        ({"lora_A": adapter()["lora_A"], "lora_B": torch.zeros(4, 2)}, "lora_B: dtype bfloat16, expected float32"),
        ({**adapter(), "lora_C": torch.zeros(1)}, r"lora_C: missing \(1 of 3 tensors are\)"),
        ({"lora_A": adapter()["lora_A"]}, r"lora_B: not expected \(1 such tensors\)"),
    ],
)
def test_fault_59_an_adapter_of_another_model_rank_or_target_is_refused(
    path: Path, expected: Weights, words: str
) -> None:
    write_weights(path, adapter(), {})
    with pytest.raises(IntegrityError, match=rf"{words}.*another base model, rank or target_modules"):
        read_weights(path, expected_of(expected))


def test_fault_59_an_adapter_of_another_base_model_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_adapter("policy", adapter(), CONFIG, "", base="0123")
        run.load_adapter("policy", base="0123")
        with pytest.raises(IntegrityError, match="trained on base model 0123, this one is 4567"):
            run.load_adapter("policy", base="4567")


def test_mistake_10_a_missing_adapter_is_an_error_and_not_random_weights(tmp_path: Path) -> None:
    with (
        RunDir.open(tmp_path / "a", resume=False) as run,
        pytest.raises(IntegrityError, match=r"selectors/u1: there is no adapter here; run the stage .* --resume"),
    ):
        run.load_adapter("selectors/u1")


@pytest.mark.parametrize(
    "field",
    [
        {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
        {"revision": "https://example.org/x"},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 4]]},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"peft_type": "PREFIX_TUNING"},
        {"r": 0},
        {"r": True},
        {"invented": 1},
    ],
)
def test_fault_60_a_field_of_an_adapter_config_that_means_more_than_plain_lora_is_refused(
    tmp_path: Path, field: dict[str, Any]
) -> None:
    (key,) = field
    with RunDir.open(tmp_path / "a", resume=False) as run:
        with pytest.raises(IntegrityError, match=rf"adapter_config.json: {key}: "):
            run.save_adapter("policy", adapter(), {**CONFIG, **field}, "")
        assert not (run.path / "policy").exists()


def test_fault_60_a_config_of_peft_itself_is_taken_and_its_empty_fields_left_out(tmp_path: Path) -> None:
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_adapter("policy", adapter(), {**lora.to_dict(), "peft_type": "LORA"}, "")
        run.load_adapter("policy")
        written = json.loads((run.path / "policy" / "adapter_config.json").read_text())
        assert written["target_modules"] == ["q_proj"]
        assert "auto_mapping" not in written
        (run.path / "policy" / "adapter_config.json").write_text(json.dumps({**written, "r": 4}))
        with pytest.raises(IntegrityError, match="was changed after it was written"):
            run.load_adapter("policy")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused_with_our_own_error_or_read(tmp_path_factory: Any, data: bytes, framed: bool) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data if framed else data)
    with pytest.raises(IntegrityError):
        read_weights(path, {"lora_A": ((2, 3), "float32")})


def test_a_pipe_a_folder_and_a_missing_file_are_refused_and_nothing_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe.safetensors", "folder.safetensors"):
        with pytest.raises(IntegrityError, match="not a regular file"):
            read_weights(tmp_path / name)
        with pytest.raises(IntegrityError, match="not a regular file"):
            sha256_of(tmp_path / name)
    with pytest.raises(IntegrityError, match="there is no such file"):
        read_weights(tmp_path / "x.safetensors")


# Names


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "..", ".", "", "a/b", "a\0b", "A", "é", "a" * 65, ".hidden", "-x", "a\n", "a b"]
)
def test_fault_46_a_run_name_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    from fedbiscuit.config import Config

    with pytest.raises(ConfigError, match=r"name: .* is not a name for a run; use 1 to 64 of"):
        run_path(tmp_path, name)
    with pytest.raises(ValueError):
        Config(name=name)


@pytest.mark.parametrize("folder", ["a\0b", "x" * 300])
def test_fault_46_an_impossible_path_is_a_plain_message(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ConfigError, match="not a usable path"):
        RunDir.open(tmp_path / folder, resume=True)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", ".lock", "", "a\0b", "x" * 200])
def test_fault_46_a_file_name_cannot_leave_the_run_folder(tmp_path: Path, name: str) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        for write in (
            lambda: run.write_text(name, ""),
            lambda: run.append_lines(name, [{}]),
            lambda: run.save_adapter(name, adapter(), CONFIG, ""),
            lambda: run.save_state(name, 0, {}, {}),
            lambda: run.save_state("s", 0, {name: {}}, {}),
            lambda: run.load_state(name),
            lambda: run.read_json(name),
        ):
            with pytest.raises(ConfigError, match="cannot be a file name in a run folder"):
                write()
    assert not (tmp_path / "x").exists()


def test_fault_46_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="a symbolic link is not taken as a run folder"):
        RunDir.open(tmp_path / "link", resume=True)
    assert os.listdir(tmp_path / "elsewhere") == []
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match="a symbolic link instead of a lock file"):
        RunDir.open(tmp_path / "b", resume=True)
    with RunDir.open(tmp_path / "a", resume=False) as run:
        (run.path / "metrics.jsonl").symlink_to(tmp_path / "mine.txt")
        (run.path / "selectors").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match="a symbolic link inside a run folder is not followed"):
            run.append_lines("metrics.jsonl", [{}])
        with pytest.raises(ConfigError, match="a symbolic link inside a run folder"):
            run.save_adapter("selectors/u0", adapter(), CONFIG, "")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert os.listdir(tmp_path / "elsewhere") == []


# Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fault_84_a_signal_waits_until_the_state_is_written(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    from fedbiscuit.rundir import states

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def press(name: str) -> None:
        if name == "state_tensors":
            signal.raise_signal(number)

    before = signal.signal(number, stop)
    try:
        with RunDir.open(tmp_path / "a", resume=False) as run:
            monkeypatch.setattr(states, "crash_point", press)
            with pytest.raises(KeyboardInterrupt):
                run.save_state("s", 4, {"u0": adapter()}, {})
            assert run.load_state("s")[0] == 4  # type: ignore[index]
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_fault_84_the_second_signal_stops_at_once_and_leaves_the_state_before(tmp_path: Path, monkeypatch: Any) -> None:
    from fedbiscuit.rundir import states

    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_state("s", 3, {"u0": adapter()}, {})
        monkeypatch.setattr(
            states, "crash_point", lambda name: signal.raise_signal(signal.SIGINT) if name != "state_begin" else None
        )
        with pytest.raises(KeyboardInterrupt):
            run.save_state("s", 4, {"u0": adapter(), "u1": adapter()}, {})
        assert os.listdir(run.path / "state" / "s") == ["00000003"]
        assert run.load_state("s")[0] == 3  # type: ignore[index]


def test_fault_84_in_a_thread_there_is_nothing_to_hold_back() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


# The disk


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_fault_85_a_write_that_stops_at_any_byte_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the system takes some bytes and refuses the rest."""
    rng = random.Random(0)
    big = {f"lora_{n}": torch.full((64, 50), float(n)) for n in range(4)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_state("s", 1, {"u0": adapter()}, {"x": 1})
        run.save_adapter("policy", adapter(), CONFIG, "card")
        run.append_lines("metrics.jsonl", [{"round": 1, "text": "x" * 10}])
        run.write_json("evaluation.json", {"x": 1})
        before = contents(run.path)
        writes: list[Callable[[], None]] = [
            lambda: run.save_state("s", 2, {"u0": big, "u1": big}, {"x": "y" * 60_000}),
            lambda: run.save_adapter("policy", big, CONFIG, "card"),
            lambda: run.append_lines("metrics.jsonl", [{"round": 2, "text": "y" * 60_000}]),
            lambda: run.write_json("evaluation.json", {"x": "y" * 60_000}),
        ]
        for write in writes:
            for _ in range(12):
                resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(50, 51_000), hard))
                try:
                    with pytest.raises(
                        EnvironmentFault, match=r"larger than this process may write \(ulimit -f\).*resume"
                    ):
                        write()
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                assert contents(run.path) == before
        assert run.load_state("s")[0] == 1  # type: ignore[index]
        run.save_state("s", 2, {"u0": big}, {})
        assert run.load_state("s")[0] == 2  # type: ignore[index]


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "replace", "mkdir"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, r"the disk is full \(.*free\); make room, then start the same command with --resume"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EROFS, "this place is read-only; give yourself the right"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_fault_85_a_full_or_read_only_disk_is_named_and_the_state_before_is_intact(
    tmp_path: Path, monkeypatch: Any, call: str, number: int, words: str
) -> None:
    with RunDir.open(tmp_path / "a", resume=False) as run:
        run.save_state("s", 1, {"u0": adapter()}, {})
        before = contents(run.path)

        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(EnvironmentFault, match=words):
                run.write_json("x.json", 2) if call == "replace" else run.save_state("s", 2, {"u0": adapter(2)}, {})
        assert contents(run.path) == before
        assert run.load_state("s")[0] == 1  # type: ignore[index]


def test_fault_85_too_little_room_is_said_with_both_sizes_before_anything_is_written(
    tmp_path: Path, monkeypatch: Any
) -> None:
    import shutil

    with RunDir.open(tmp_path / "a", resume=False) as run:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 3000, 3000))
        with pytest.raises(EnvironmentFault, match=r"the disk is full \(80.5 kB needed, 3.0 kB free\)"):
            run.save_state("s", 1, {"u0": {"a": torch.zeros(3741)}}, {"x": 0})
        with pytest.raises(EnvironmentFault, match=r"\(2.0 GB needed, 3.0 kB free\)"):
            check_space(tmp_path / "not" / "yet", 2 * 10**9)
        check_space(tmp_path, 3000)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_fault_85_a_place_that_cannot_be_written_is_said_when_the_run_is_opened(
    tmp_path: Path, monkeypatch: Any, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(EnvironmentFault, match="set runs_dir to another folder"):
        RunDir.open(tmp_path / "a", resume=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_fault_85_a_folder_without_the_right_to_write_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EnvironmentFault, match="may not be written by you"):
            RunDir.open(tmp_path / "a", resume=False)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_fault_85_dev_full_is_a_full_disk(tmp_path: Path, monkeypatch: Any) -> None:
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *mode: real("/dev/full" if ".tmp-" in str(path) else path, flags, *mode)
    )
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        atomic_write(tmp_path / "a.txt", "x" * 100)
    assert os.listdir(tmp_path) == []


# Damaged states


def two_states(folder: Path) -> None:
    with RunDir.open(folder, resume=False) as run:
        run.save_state("s", 1, {"u0": adapter(1), "u1": adapter(2)}, {"step": 1})
        run.save_state("s", 2, {"u0": adapter(3), "u1": adapter(4)}, {"step": 2})


@pytest.mark.parametrize("file", ["manifest.json", "values.json", "u0.safetensors", "u1.safetensors"])
def test_fault_86_a_flipped_byte_anywhere_in_a_state_is_found(tmp_path: Path, file: str) -> None:
    two_states(tmp_path / "a")
    path = tmp_path / "a" / "state" / "s" / "00000002" / file
    whole, look = path.read_bytes(), RunDir.view(tmp_path / "a")
    for position in range(0, len(whole), 1 if file.endswith("json") else 7):
        for bit in (0x01, 0x20, 0x80):
            changed = bytearray(whole)
            changed[position] ^= bit
            path.write_bytes(changed)
            assert look.load_state("s")[0] == 1, (position, bit)  # type: ignore[index]
    path.write_bytes(whole)
    assert look.load_state("s")[0] == 2  # type: ignore[index]


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: (state / "manifest.json").unlink(),
        lambda state: (state / "u1.safetensors").unlink(),
        lambda state: (state / "values.json").write_bytes(b""),
        lambda state: (state / "manifest.json").write_bytes(b"{}"),
        lambda state: (state / "manifest.json").write_bytes(b"[" * 10**5),
        lambda state: (state / "extra.safetensors").write_bytes(b""),
        lambda state: [entry.unlink() for entry in state.iterdir()],
        lambda state: os.rename(state, state.with_name("00000009")),
        lambda state: os.truncate(state / "u0.safetensors", 99),
    ],
)
def test_fault_86_a_half_state_is_stepped_back_from_loudly_and_set_aside(
    tmp_path: Path, caplog: Any, damage: Callable[[Path], object]
) -> None:
    two_states(tmp_path / "a")
    damage(tmp_path / "a" / "state" / "s" / "00000002")
    with RunDir.open(tmp_path / "a", resume=True) as run:
        found = run.load_state("s")
        assert found is not None
        assert (found[0], found[2]) == (1, {"step": 1})
        assert torch.equal(found[1]["u0"]["lora_A"], adapter(1)["lora_A"])
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert record.name == "fedbiscuit"
        assert record.getMessage().startswith("STEPPING BACK from s ")
        assert run.notices == [record.getMessage()]
        run.save_state("s", 2, {"u0": adapter(3), "u1": adapter(4)}, {"step": 2})
        assert run.load_state("s")[0] == 2  # type: ignore[index]
        assert len(run.notices) == 1
        assert sum(name.startswith("bad-") for name in os.listdir(run.path / "state" / "s")) == 1


def test_fault_86_when_no_state_can_be_read_the_run_stops_every_time_and_nothing_is_removed(tmp_path: Path) -> None:
    two_states(tmp_path / "a")
    for state in (tmp_path / "a" / "state" / "s").iterdir():
        (state / "values.json").write_text("{}")
    before = contents(tmp_path / "a")
    for _ in range(2):
        with (
            RunDir.open(tmp_path / "a", resume=True) as run,
            pytest.raises(IntegrityError, match=r"none of the 2 saved states can be read .*values.json.*backup"),
        ):
            run.load_state("s")
    assert contents(tmp_path / "a") == before


def test_fault_86_a_folder_that_was_being_replaced_when_the_power_went_comes_back(tmp_path: Path) -> None:
    two_states(tmp_path / "a")
    state = tmp_path / "a" / "state" / "s"
    os.rename(state / "00000002", state / ".old-00000002")
    (state / ".tmp-00000002").mkdir()
    with RunDir.open(tmp_path / "a", resume=True) as run:
        assert run.load_state("s")[0] == 2  # type: ignore[index]
    assert sorted(os.listdir(state)) == ["00000001", "00000002"]


# Two at once

HOLD = "import sys, time; from fedbiscuit.rundir import RunDir; run = RunDir.open(sys.argv[1], resume=True); print('open', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that has the folder ``a`` open."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_fault_87_a_folder_in_use_names_the_process(tmp_path: Path, holder: Any) -> None:
    for resume in (True, False):
        with pytest.raises(
            EnvironmentFault, match=rf"a: in use by process {holder.pid} on .*, started 20.*kill {holder.pid}"
        ):
            RunDir.open(tmp_path / "a", resume=resume)
    lock = json.loads((tmp_path / "a" / "run.lock").read_text())
    assert lock["pid"] == holder.pid
    assert set(lock) == {"pid", "boot", "host", "started"}


def test_fault_87_the_lock_of_a_process_that_was_killed_is_no_obstacle_and_is_said(
    tmp_path: Path, holder: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    holder.kill()
    holder.wait()
    with RunDir.open(tmp_path / "a", resume=True) as run:
        assert f"process {holder.pid} on " in run.notices[0]
        assert "ended without closing; going on from the last complete state" in caplog.text
    assert (tmp_path / "a" / "run.lock").read_text() == ""
    with RunDir.open(tmp_path / "a", resume=True) as run:
        assert not any("without closing" in notice for notice in run.notices)


def test_fault_87_a_lock_from_before_a_restart_of_the_machine_is_explained(tmp_path: Path) -> None:
    import socket

    (tmp_path / "a").mkdir()
    stale = {"pid": os.getpid(), "boot": "other", "host": socket.gethostname(), "started": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "a" / "run.lock").write_text(json.dumps(stale))
    with RunDir.open(tmp_path / "a", resume=True) as run:
        assert "when the machine was restarted" in run.notices[0]
    (tmp_path / "a" / "run.lock").write_bytes(b"\xff{not json")
    RunDir.open(tmp_path / "a", resume=True).close()


def test_fault_87_the_same_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    with (
        RunDir.open(tmp_path / "a", resume=False),
        pytest.raises(EnvironmentFault, match="open already in this process"),
    ):
        RunDir.open(tmp_path / "a", resume=True)
    RunDir.open(tmp_path / "a", resume=True).close()


def test_fault_87_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom fedbiscuit.rundir import RunDir\nrun = RunDir.open(sys.argv[1], resume=True)\n"
        "child = os.fork()\nif child == 0:\n    time.sleep(30)\n    os._exit(0)\nprint(child, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    answer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert answer.stdout is not None
    child = int(answer.stdout.readline())
    try:
        answer.wait()
        for _ in range(50):  # the child may not have run its first line yet
            try:
                RunDir.open(tmp_path / "a", resume=True).close()
                return
            except EnvironmentFault:
                time.sleep(0.1)
        pytest.fail("the child still holds the lock")
    finally:
        os.kill(child, signal.SIGKILL)
        answer.stdout.close()


def test_fault_87_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(EnvironmentFault, match=r"this file system has no locks.*local disk"):
        RunDir.open(tmp_path / "a", resume=False)


def test_every_message_of_this_room_is_one_of_ours_with_its_exit_code() -> None:
    assert [kind.exit_code for kind in (ConfigError, EnvironmentFault, IntegrityError)] == [2, 3, 5]
    assert all(issubclass(kind, FedbiscuitError) for kind in (ConfigError, EnvironmentFault, IntegrityError))
