"""A hang on NCCL is reported with the file of torch's flight recorder, or with the variables that let it write one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_longctx.resilience import failed_ranks
from hf_longctx.resilience.failed_ranks import HangWatch
from hf_longctx.resilience.flight_recorder import describe_dump, dump_file


HOME = {"HOME": "/home/ada"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (HOME, "/home/ada/.cache/torch/comm_lib_trace_rank_3"),
        ({}, "/tmp/.cache/torch/comm_lib_trace_rank_3"),
        ({**HOME, "XDG_CACHE_HOME": "/cache"}, "/cache/torch/comm_lib_trace_rank_3"),
        ({**HOME, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/logs/old_"}, "/logs/old_3"),
        ({"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/logs/old_", "TORCH_FR_DUMP_TEMP_FILE": "/logs/new_"}, "/logs/new_3"),
        ({"TORCH_FR_DUMP_TEMP_FILE": "/logs/one", "TORCH_FR_DUMP_DYNAMIC_FILE_NAME": "True"}, "/logs/one"),
    ],
    ids=["home", "no home", "cache folder", "older name", "both names", "dynamic"],
)
def test_the_file_is_the_one_that_torch_opens(environment, expected):
    assert dump_file(3, environment) == Path(expected)
    told = describe_dump(3, environment)
    assert f"will write, when NCCL's timeout ends the run, this rank's last collectives to `{expected}`" in told
    assert f"`torchfrtrace {Path(expected).parent}`" in told


@pytest.mark.parametrize(
    ("environment", "variables"),
    [
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}, "TORCH_NCCL_TRACE_BUFFER_SIZE=2000"),
        ({"TORCH_FR_BUFFER_SIZE": "0"}, "TORCH_FR_BUFFER_SIZE=2000"),
        # NCCL's timeout asks the older name alone, so the newer one does not bring the dump back.
        ({"TORCH_FR_BUFFER_SIZE": "9", "TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}, "TORCH_NCCL_TRACE_BUFFER_SIZE=2000"),
        ({"TORCH_NCCL_DUMP_ON_TIMEOUT": "No"}, "TORCH_NCCL_DUMP_ON_TIMEOUT=1"),
        (
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "-1", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"},
            "TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1",
        ),
    ],
)
def test_a_recorder_that_is_off_is_reported_with_the_variables_to_set(environment, variables):
    told = describe_dump(0, environment)
    assert told.startswith(f"torch's flight recorder writes no dump: start the next run with {variables} to get ")
    assert "`" not in told, "no file is promised"


@pytest.mark.parametrize("value", ["1", "y", "YES", "t", "True"])
def test_every_spelling_of_true_lets_it_write(value):
    assert "will write" in describe_dump(0, {"TORCH_NCCL_DUMP_ON_TIMEOUT": value, "TORCH_FR_BUFFER_SIZE": "10"})


def test_a_dump_of_this_hang_is_told_from_one_of_an_earlier_run(tmp_path):
    environment = {"TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "trace_")}
    file = tmp_path / "trace_1"
    file.write_bytes(b"")
    written = file.stat().st_mtime
    assert f"has written this rank's last collectives to `{file}`" in describe_dump(1, environment, written - 1)
    assert "will write" in describe_dump(1, environment, written + 1)
    assert "will write" in describe_dump(0, environment, written - 1), "another rank's file"


class Store(dict):
    """What the watch uses of a process group's store."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)


def reported(monkeypatch, caplog, backends: str) -> str:
    """What the watch logs about a run of one rank that has not moved for a minute."""
    store = Store()
    monkeypatch.setattr(failed_ranks, "_store", lambda: store)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    watch, ended = HangWatch(), threading.Event()
    watch._moved = time.monotonic() - 60
    before = dict(os.environ)
    with caplog.at_level("WARNING", logger="hf_longctx"):
        thread = threading.Thread(target=watch._watch, args=(0, 1, 0.2, ended, threading.get_ident()))
        thread.start()
        deadline = time.monotonic() + 20
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.set()
        thread.join()
    assert dict(os.environ) == before, "nothing is set for torch"
    (record,) = caplog.records
    return record.getMessage()


@pytest.mark.parametrize("backends", ["cuda:nccl", "cpu:gloo,cuda:nccl"])
def test_a_hang_on_nccl_names_the_dump(monkeypatch, caplog, backends):
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/logs/trace_")
    told = reported(monkeypatch, caplog, backends)
    assert told.startswith("no progress for 60 s")
    assert told.endswith("to `/logs/trace_0`: `torchfrtrace /logs` compares the files of all ranks")


def test_a_hang_on_gloo_names_no_dump(monkeypatch, caplog):
    told = reported(monkeypatch, caplog, "cpu:gloo")
    assert told.startswith("no progress for 60 s") and "flight recorder" not in told


def test_torch_still_reads_these_variables():
    """The headers of the installed torch; a change there ends in a wrong file name, or in none."""
    headers = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
    recorder = " ".join((headers / "FlightRecorder.hpp").read_text().split())
    assert 'getCvarInt( {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"}, 2000)' in recorder
    assert "filename_ = c10::str(namePrefix, rank);" in recorder
    nccl = " ".join((headers / "ProcessGroupNCCL.hpp").read_text().split())
    assert 'TORCH_NCCL_TRACE_BUFFER_SIZE = { "TORCH_NCCL_TRACE_BUFFER_SIZE"};' in nccl
    assert 'TORCH_NCCL_DUMP_ON_TIMEOUT = { "TORCH_NCCL_DUMP_ON_TIMEOUT"};' in nccl
