"""NVIDIA's GPUs of this machine, without torch: those on the PCI bus, and those that nvidia-smi shows."""

import glob
import subprocess
from pathlib import Path


def devices() -> int:
    """NVIDIA GPUs on the PCI bus, whether or not a driver is loaded."""
    found = 0
    for device in glob.glob("/sys/bus/pci/devices/*"):
        try:
            vendor, kind = Path(device, "vendor").read_text().strip(), Path(device, "class").read_text().strip()
        except OSError:
            continue
        found += vendor == "0x10de" and kind[:6] in ("0x0300", "0x0302")  # display and 3D controllers
    return found


def gpus() -> list[dict]:
    """nvidia-smi's GPUs: name, driver, GiB of memory, GiB in use. ValueError: it is missing or fails."""
    query = "name,driver_version,memory.total,memory.used"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError as error:
        raise ValueError("it has NVIDIA devices and no nvidia-smi") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError("nvidia-smi did not answer within 20 s") from error
    if result.returncode:
        text = (result.stdout + result.stderr).strip().splitlines()
        raise ValueError(f"nvidia-smi failed: {text[-1] if text else result.returncode}")
    rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines() if line.strip()]
    return [{"name": r[0], "driver": r[1], "gib": float(r[2]) / 1024, "used_gib": float(r[3]) / 1024} for r in rows]
