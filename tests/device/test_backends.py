"""What every back end answers before PyTorch is imported, and how the vendors' probes read what is there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import siirl_cuda
import siirl_cuda.driver
import siirl_npu
import siirl_npu.preflight
from siirl.device import Backend, CommSpec, Probe, host
from siirl_cpu import CpuBackend
from siirl_cuda import CudaBackend
from siirl_npu import NpuBackend
from tests.device.distribution import install

BACKENDS = [CpuBackend, CudaBackend, NpuBackend]

# A driver with two devices that honours the visibility variable as the real one does, or fails with code 100.
DRIVER = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return getenv("FAKE_CUDA_ERROR") ? 100 : 0; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuDeviceGetCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = visible && !strlen(visible) ? 0 : 2;
    return 0;
}
int cuGetErrorString(int code, const char **words) { *words = code ? "no device is detected" : "no error"; return 0; }
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_stage_zero_answers(backend: type[Backend]) -> None:
    assert backend().name == backend.name
    assert backend.kernel_order()[-1] == "torch", "the reference comes last"
    engines = {(engine.kind, engine.name) for engine in backend.engines()}
    assert {("rollout", "native"), ("training", "fsdp")} <= engines
    assert backend.launcher_resources(3) in ({"num_cpus": 3}, {"num_gpus": 3}, {"resources": {"NPU": 3}})
    spec = backend().communication()
    assert "gloo" in spec.torch_backend, "control data lies in host memory"


@pytest.mark.parametrize(
    ("backend", "variable", "torch_backend"),
    [
        (CudaBackend, "CUDA_VISIBLE_DEVICES", "cpu:gloo,cuda:nccl"),
        (NpuBackend, "ASCEND_RT_VISIBLE_DEVICES", "cpu:gloo,npu:hccl"),
    ],
)
def test_accelerators_name_their_variable_and_library(
    backend: type[Backend], variable: str, torch_backend: str
) -> None:
    assert backend.visible_devices_env() == variable
    assert backend().communication().torch_backend == torch_backend
    assert backend.is_accelerator()


@pytest.mark.parametrize("backend", [CudaBackend, NpuBackend])
def test_only_a_trainer_grows_its_segments_and_the_users_choice_stays(
    backend: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    assert "expandable_segments:True" in backend.bootstrap_env("trainer").values()
    for role in ("driver", "colocated", "rollout"):
        assert "expandable_segments:True" not in backend.bootstrap_env(role).values()  # type: ignore[arg-type]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert "expandable_segments:True" not in backend.bootstrap_env("trainer").values()


def test_a_probe_with_a_problem_is_not_available() -> None:
    probe = Probe.of("2 cards", 2, {}, [("a", "fix"), ("b", "fix")])
    assert (probe.available, probe.count, probe.reason, probe.fixes) == (False, 0, "a; b", ("fix",))
    assert probe.present == 2
    assert Probe.of("2 cards", 2, {}, []) == Probe(True, 2, "2 cards", present=2)


def test_long_group_names_stay_apart_within_the_limit() -> None:
    spec = CommSpec("gloo", {}, max_group_name=32)
    names = {spec.group_name("data_parallel_tensor_parallel_" + suffix) for suffix in ("0", "1", "00")}
    assert len(names) == 3
    assert all(len(name) <= 32 for name in names)
    assert spec.group_name("short") == "short"
    assert CommSpec("gloo", {}).group_name("x" * 100) == "x" * 100


@pytest.fixture
def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("needs a C compiler to build a stand-in for the driver's library")
    return found


@pytest.fixture
def cuda_driver(tmp_path: Path, compiler: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(siirl_cuda.driver, "NODES", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(host, "torch_build", lambda: {"__version__": "2.13.0+cu126", "cuda": "12.6"})
    return library


def test_cuda_counts_the_devices_the_driver_shows(cuda_driver: Path) -> None:
    probe = CudaBackend.probe()
    assert (probe.available, probe.count) == (True, 2), probe
    assert probe.versions == {"torch": "2.13.0+cu126", "cuda": "12.6", "driver's cuda": "12.4"}
    assert probe.devices == ()


# Two devices, of which the second has no NVLink: its query fails with NVML_ERROR_NOT_SUPPORTED (3), as NVML's does.
NVML = """
#include <stdio.h>
typedef struct { unsigned long long total, free, used; } memory_t;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(index + 1L); return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) { memory->total = 80ULL << 30; return 0; }
int nvmlDeviceGetNvLinkState(void *handle, unsigned link, unsigned *active) {
    *active = link != 1;
    return handle == (void *)1L && link < 12 ? 0 : 3;
}
int nvmlDeviceGetName(void *handle, char *words, unsigned n) { snprintf(words, n, "NVIDIA H100"); return 0; }
int nvmlDeviceGetUUID(void *handle, char *words, unsigned n) { snprintf(words, n, "GPU-%p", handle); return 0; }
int nvmlSystemGetDriverVersion(char *words, unsigned n) { snprintf(words, n, "580.65.06"); return 0; }
"""
# What `nvidia-smi --query-gpu=driver_version,name,uuid,memory.total --format=csv,noheader,nounits` prints.
SMI = "#!/bin/sh\necho '570.12, NVIDIA L4, GPU-7, 23034'\n"


def test_cuda_describes_each_device_with_nvml(cuda_driver: Path, compiler: str) -> None:
    (cuda_driver.parent / "nvml.c").write_text(NVML)
    library = cuda_driver.with_name("libnvidia-ml.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, cuda_driver.with_name("nvml.c")], check=True)
    probe = CudaBackend.probe()
    assert probe.versions["driver"] == "580.65.06"
    assert probe.devices == (
        "0: NVIDIA H100, 80.0 GiB, 11 NVLinks, GPU-0x1",
        "1: NVIDIA H100, 80.0 GiB, GPU-0x2",
    )


def test_cuda_asks_nvidia_smi_where_nvml_cannot_be_loaded(cuda_driver: Path) -> None:
    program = cuda_driver.with_name("nvidia-smi")
    program.write_text(SMI)
    program.chmod(0o755)
    probe = CudaBackend.probe()
    assert probe.versions["driver"] == "570.12"
    assert probe.devices == ("0: NVIDIA L4, 22.5 GiB, GPU-7",)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert CudaBackend.probe().devices == ()


def test_cuda_says_what_the_driver_says(cuda_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_ERROR", "1")
    assert CudaBackend.probe().problems == ("the NVIDIA driver says: no device is detected (error 100)",)


def test_cuda_says_when_the_variable_hides_all(cuda_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert CudaBackend.probe().problems == ("the NVIDIA driver shows no device to this process",)


def test_cuda_says_when_the_driver_is_too_old(cuda_driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "torch_build", lambda: {"__version__": "2.13.0+cu130", "cuda": "13.0"})
    assert CudaBackend.probe().problems == ("PyTorch is built for CUDA 13.0, the driver supports 12.4",)


def test_cuda_says_when_there_is_no_driver(cuda_driver: Path) -> None:
    cuda_driver.unlink()
    (problem,) = CudaBackend.probe().problems
    assert "libcuda.so.1 cannot be loaded" in problem


def test_cuda_says_when_pytorch_is_built_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "torch_build", lambda: {"__version__": "2.13.0+cpu", "cuda": None})
    assert "PyTorch 2.13.0+cpu is built without CUDA" in CudaBackend.probe().reason


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", (989.5e12, 3.35e12)),
        ("NVIDIA H100 PCIe", (756.5e12, 2.0e12)),
        ("NVIDIA A100-SXM4-40GB", (312e12, 1.555e12)),
        ("NVIDIA L4", (121e12, 300e9)),
        ("NVIDIA L40", (None, None)),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (None, None)),
    ],
)
def test_peaks_are_those_of_the_data_sheets_or_unknown(
    device_name: str, expected: tuple[float | None, float | None]
) -> None:
    assert siirl_cuda.published(device_name) == expected


@pytest.fixture
def npu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PyTorch's CPU build, torch-npu of the same release, four devices, CANN's libraries loadable."""
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "torch", "2.13.0+cpu")
    install(tmp_path, "torch-npu", "2.13.0.post1")
    monkeypatch.setattr(host, "torch_build", lambda: {"__version__": "2.13.0+cpu", "cuda": None})
    monkeypatch.setattr(siirl_npu, "NODES", str(tmp_path / "davinci[0-9]*"))
    monkeypatch.setattr(siirl_npu.preflight, "ASK_LIBRARIES", "print('{\"missing\": []}')")
    monkeypatch.setattr(siirl_npu.preflight, "INSTALLATIONS", (str(tmp_path / "cann"),))
    monkeypatch.setattr(siirl_npu.preflight, "DRIVER_RECORD", tmp_path / "ascend_install.info")
    (tmp_path / "ascend_install.info").write_text(f"Driver_Install_Path_Param={tmp_path}\n")
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for index in range(4):
        (tmp_path / f"davinci{index}").touch()
    (tmp_path / "davinci_manager").touch()
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_npu_counts_the_device_nodes_that_are_visible(npu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NpuBackend.probe().count == 4, NpuBackend.probe()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,2")
    assert NpuBackend.probe().count == 2
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    assert NpuBackend.probe().problems == ("ASCEND_RT_VISIBLE_DEVICES hides every device",)


# As the installers write them: https://www.hiascend.com/document/detail/en/canncommercial/850/softwareinst/instg
CANN_RECORD = """package_name=Ascend-cann-toolkit
version={version}
innerversion=V100R001C23SPC002B210
arch=aarch64
os=linux
"""
DRIVER_RECORD = """Version=25.3.rc1
ascendhal_version=7.35.23
Innerversion=V100R001C23SPC002B212
package_version=25.3.rc1
"""


def write_record(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_npu_reads_the_releases_of_cann_and_of_the_driver(npu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = f"{platform.machine()}-linux/ascend_toolkit_install.info"
    write_record(npu_machine / "cann" / record, CANN_RECORD.format(version="9.1.0"))
    write_record(npu_machine / "driver" / "version.info", DRIVER_RECORD)
    probe = NpuBackend.probe()
    assert probe.available, probe
    assert (probe.versions["cann"], probe.versions["driver"]) == ("9.1.0", "25.3.rc1")
    assert "CANN 9.1.0" in probe.reason
    write_record(npu_machine / "other" / record, CANN_RECORD.format(version="8.5.0"))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(npu_machine / "other"))
    assert NpuBackend.probe().versions["cann"] == "8.5.0", "set_env.sh decides which of several is used"


def test_npu_says_when_cann_is_too_old(npu_machine: Path) -> None:
    record = npu_machine / "cann" / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
    write_record(record, CANN_RECORD.format(version="8.2.RC1"))
    probe = NpuBackend.probe()
    assert probe.problems == ("CANN 8.2.RC1 is older than 8.5, the first that torch-npu 2.13.0.post1 works with",)
    assert "install CANN 8.5 or newer" in probe.fixes[0]


def test_a_candidate_of_the_same_release_fits(npu_machine: Path) -> None:
    shutil.rmtree(npu_machine / "torch_npu-2.13.0.post1.dist-info")
    install(npu_machine, "torch-npu", "2.13.0rc1")
    assert NpuBackend.probe().available, NpuBackend.probe()


def test_npu_says_when_the_releases_differ(npu_machine: Path) -> None:
    shutil.rmtree(npu_machine / "torch_npu-2.13.0.post1.dist-info")
    install(npu_machine, "torch-npu", "2.12.0")
    probe = NpuBackend.probe()
    assert probe.problems == ("torch-npu 2.12.0 does not fit PyTorch 2.13.0+cpu",)
    assert probe.fixes == ("pip install torch-npu==2.13.0.*",)


def test_npu_says_that_a_cuda_build_is_refused(npu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "torch_build", lambda: {"__version__": "2.13.0", "cuda": "13.0"})
    assert NpuBackend.probe().problems == ("PyTorch is built for CUDA 13.0, and torch-npu refuses it",)


def test_npu_says_that_two_tritons_clash(npu_machine: Path) -> None:
    install(npu_machine, "triton", "3.4.0")
    install(npu_machine, "triton-ascend", "3.2.0")
    assert "overwrite each other" in NpuBackend.probe().reason


def test_npu_says_which_libraries_of_cann_are_missing(npu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.syspath_prepend(npu_machine)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    reason = NpuBackend.probe().reason
    assert "libascendcl.so, libhccl.so, libge_runner.so cannot be loaded, ASCEND_HOME_PATH is not set" in reason


def test_a_library_that_hangs_or_crashes_costs_the_child_alone() -> None:
    assert "did not answer within 0.5 s" in host.ask_child("import time; time.sleep(9)", timeout_s=0.5)["error"]
    assert "status -6" in host.ask_child("import os; os.abort()")["error"]
    assert host.ask_child("raise OSError('no such library')")["error"].endswith("OSError: no such library")
