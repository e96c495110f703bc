from __future__ import annotations

from pathlib import Path

import pytest

from wsgi_ts.gpu.assign import Assigner, Placement, group_devices, place
from wsgi_ts.gpu.devices import USAGE_FAILED, gpu_count, gpu_usage, visible_devices


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
