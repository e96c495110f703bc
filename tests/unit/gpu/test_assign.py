from __future__ import annotations

from pathlib import Path

import pytest

from wsgi_ts.errors import WorkerInitializationError
from wsgi_ts.gpu.assign import Assigner, Placement, group_devices, place
from wsgi_ts.gpu.devices import USAGE_FAILED, gpu_count, gpu_usage, visibility, visible_devices
from wsgi_ts.models.workers import limit_workers


def gpus_of(assigner: Assigner, placement: Placement, count: int) -> list[int | None]:
    return [assigner.next(placement, nth) for nth in range(count)]


def test_no_gpu_is_the_cpu() -> None:
    placement = place(0, "gpu")
    assert placement.device_type == "cpu"
    assert gpus_of(Assigner(0), placement, 3) == [None, None, None]


def test_device_type_cpu_wins_over_gpus() -> None:
    placement = place(4, "cpu")
    assert (placement.device_type, placement.usable_gpus) == ("cpu", 0)
    assert Assigner(4).next(placement, 0) is None


def test_round_robin_begins_with_the_second_gpu() -> None:
    assert gpus_of(Assigner(3), place(3), 5) == [1, 2, 0, 1, 2]


def test_one_gpu_is_always_number_zero() -> None:
    assert gpus_of(Assigner(1), place(1), 3) == [0, 0, 0]


def test_round_robin_is_shared_by_all_models() -> None:
    assigner = Assigner(3)
    assert assigner.next(place(3), 0) == 1
    assert assigner.next(place(3, "gpu"), 0) == 2


def test_device_ids_have_a_round_robin_of_their_own() -> None:
    assigner = Assigner(4)
    placement = place(4, device_ids=[3, 1])
    assert placement.usable_gpus == 2
    assert gpus_of(assigner, placement, 3) == [3, 1, 3]
    assert assigner.next(place(4), 0) == 1


@pytest.mark.parametrize("ids", [[0, 4], [-1], [1, 2, 9]])
def test_a_wrong_device_id_drops_the_whole_list(ids: list[int]) -> None:
    placement = place(4, device_ids=ids)
    assert placement.device_ids is None
    assert placement.usable_gpus == 4
    wrong = next(number for number in ids if not 0 <= number < 4)
    assert placement.warnings == (f"Invalid deviceId:{wrong}, ignore deviceIds list",)


def test_parallel_workers_take_slices() -> None:
    placement = place(4, parallel_level=2)
    starts = gpus_of(Assigner(4), placement, 3)
    assert starts == [0, 2, 0]
    assert [group_devices(placement, nth) for nth in range(3)] == [(0, 1), (2, 3), (0, 1)]


def test_parallel_workers_take_slices_of_their_list() -> None:
    placement = place(8, device_ids=[7, 5, 3, 1], parallel_level=2)
    assert gpus_of(Assigner(8), placement, 3) == [7, 3, 7]
    assert group_devices(placement, 1) == (3, 1)


#: What the model asks for, and the GPUs of its workers in turn, as CUDA_VISIBLE_DEVICES shows them.
GROUPS = [
    # A group of N takes the next N.
    pytest.param(8, None, 4, ["0,1,2,3", "4,5,6,7"], id="the next four of eight"),
    pytest.param(8, [2, 3, 4, 5], 2, ["2,3", "4,5"], id="the next two of deviceIds"),
    pytest.param(8, [5, 2, 4, 3], 2, ["5,2", "4,3"], id="in the order of deviceIds"),
    pytest.param(8, None, 3, ["0,1,2", "3,4,5"], id="what is left over stays unused"),
    pytest.param(8, [0, 9], 2, ["0,1", "2,3", "4,5", "6,7"], id="a wrong list is ignored"),
    pytest.param(2, None, 1, ["0", "1"], id="groups of one"),
]


@pytest.mark.parametrize(("gpus", "ids", "level", "shown"), GROUPS)
def test_groups_take_the_next_gpus(gpus: int, ids: list[int] | None, level: int, shown: list[str]) -> None:
    placement = place(gpus, device_ids=ids, parallel_level=level)
    assert placement.worker_limit == len(shown)
    devices = [group_devices(placement, nth) for nth in range(len(shown))]
    assert [visibility(each, {})["CUDA_VISIBLE_DEVICES"] for each in devices] == shown
    # The worker's own number, which decides its batcher, is the first of them.
    assert gpus_of(Assigner(gpus), placement, len(shown)) == [each[0] for each in devices]


def test_groups_do_not_move_the_round_robin_of_ordinary_workers() -> None:
    assigner = Assigner(4)
    gpus_of(assigner, place(4, parallel_level=2), 2)
    assert gpus_of(assigner, place(4), 4) == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("environ", "devices", "shown"),
    [
        pytest.param({}, [1, 0], {"CUDA_VISIBLE_DEVICES": "1,0"}, id="nothing is restricted"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "4,6"}, [1], {"CUDA_VISIBLE_DEVICES": "6"}, id="numbers of a subset"),
        pytest.param(
            {"CUDA_VISIBLE_DEVICES": "MIG-a/3/0, MIG-a/4/0"}, [1], {"CUDA_VISIBLE_DEVICES": "MIG-a/4/0"}, id="MIG"
        ),
        pytest.param(
            {"CUDA_VISIBLE_DEVICES": "GPU-x,GPU-y"}, [0, 1], {"CUDA_VISIBLE_DEVICES": "GPU-x,GPU-y"}, id="names"
        ),
        pytest.param(
            {"HIP_VISIBLE_DEVICES": "2,3", "ROCR_VISIBLE_DEVICES": "GPU-p,GPU-q"},
            [1],
            {"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "3", "ROCR_VISIBLE_DEVICES": "GPU-q"},
            id="ROCm",
        ),
    ],
)
def test_names_of_devices_are_passed_through(
    environ: dict[str, str], devices: list[int], shown: dict[str, str]
) -> None:
    assert visibility(devices, environ) == shown


def test_too_few_gpus_says_how_many_there_are_and_who_has_them() -> None:
    placement = place(4, device_ids=[1, 2], parallel_level=3)
    holders = {1: ["bert 1.0 worker 9000", "llm 2.0 worker 29500"], 3: ["other 1.0 worker 9001"]}
    with pytest.raises(WorkerInitializationError) as caught:
        limit_workers(placement, "big", 1, 2, holders)
    assert str(caught.value) == (
        "No enough gpu devices for model:big parallelLevel:3. A worker needs 3, the model may use 2 "
        "(GPU 1: bert 1.0 worker 9000, llm 2.0 worker 29500; GPU 2: free)."
    )


def test_fewer_workers_are_started_where_not_all_fit() -> None:
    assert limit_workers(place(8, parallel_level=4), "big", 3, 5, {}) == (2, 2)
    assert limit_workers(place(0, parallel_level=4), "big", 3, 5, {}) == (3, 5)
    assert limit_workers(place(8), "small", 30, 50, {}) == (30, 50)


@pytest.mark.parametrize(("gpus", "level", "limit"), [(4, 2, 2), (4, 3, 1), (2, 4, 0), (0, 4, None), (4, 0, None)])
def test_workers_are_limited_by_what_fits(gpus: int, level: int, limit: int | None) -> None:
    assert place(gpus, parallel_level=level).worker_limit == limit


class TestDevices:
    @pytest.fixture
    def tool(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A program in the place of nvidia-smi, on a machine with three GPUs."""
        path = tmp_path / "nvidia-smi"
        path.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            "*utilization*--id=2*) echo '5 %, 1 %, 678 MiB';;\n"
            "*utilization*) echo '0 %, 0 %, 0 MiB';;\n"
            "*) printf '0\\n1\\n2\\n';;\nesac\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return path

    def test_without_the_tool_there_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nonexistent")
        assert gpu_count(None, {}) == 0
        assert gpu_count(2, {"CUDA_VISIBLE_DEVICES": "0,1"}) == 0

    @pytest.mark.parametrize(
        ("restricted", "expected"),
        [("2,0", ["2", "0"]), ("", []), ("-1", []), ("1,7,2", ["1"]), ("GPU-abc", ["GPU-abc"])],
    )
    def test_visible_devices_count(self, tool: Path, restricted: str, expected: list[str]) -> None:
        assert visible_devices({"CUDA_VISIBLE_DEVICES": restricted}) == expected

    def test_limit(self, tool: Path) -> None:
        assert gpu_count(None, {}) == 3
        assert gpu_count(2, {}) == 2
        assert gpu_count(5, {}) == 3
        assert gpu_count(0, {}) == 0

    def test_usage_has_the_form_of_torchserve(self, tool: Path) -> None:
        environ = {"CUDA_VISIBLE_DEVICES": "2,0"}
        assert gpu_usage(0, environ) == (
            "gpuId::0 utilization.gpu [%]::5 % utilization.memory [%]::1 % memory.used [MiB]::678 MiB"
        )
        assert gpu_usage(3, environ) == USAGE_FAILED

    def test_a_failing_tool_is_no_gpu(self, tool: Path) -> None:
        tool.write_text("#!/bin/sh\nexit 9\n")
        assert gpu_count(None, {}) == 0
        assert gpu_usage(0, {}) == USAGE_FAILED
