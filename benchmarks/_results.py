"""Shared by the benchmarks: the machine's name, memory, fresh processes and saved results."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> str:
    """The name of the processor, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpus.read_text() if cpus.exists() else "")
    return names[0] if names else platform.machine()


def peak_bytes(device: str, run: Callable[[], Any]) -> int:
    """The most memory that `run` holds at a time, in addition to what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to current usage
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A line of this process's memory accounting."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", status)[0]) * 1024


def measured_alone(script: str, one: Any, *flags: object) -> dict[str, Any]:
    """The JSON that `SCRIPT --one ONE FLAGS` prints last, run in a fresh process."""
    command = [sys.executable, script, "--one", json.dumps(one), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{one} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def save(kind: str, result: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write `KIND-MACHINE.json`; the result names its machine."""
    slug = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}-{slug}.json").write_text(json.dumps(result, indent=1) + "\n")
