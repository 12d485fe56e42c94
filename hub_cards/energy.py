"""How much energy a run took, estimated: from its wall time and the rated power of what it ran on.

No run measures its energy. An accelerator counts with its maker's rated board power, processor cores with a round
figure: data sheets of the last years give 4 W a core (servers of many cores) to 11 W (desktops). Each is taken as at
full load all the time; the rest of the machine and its cooling are not counted.
"""

from typing import Any, NamedTuple

WATTS_PER_CORE = 10
# By the name that torch gives, without the maker's. A slice of an accelerator (MIG) has another name, and no figure.
WATTS_PER_ACCELERATOR = {
    "A10": 150,
    "A10G": 300,
    "A100 80GB PCIe": 300,
    "A100-PCIE-40GB": 250,
    "A100-SXM4-40GB": 400,
    "A100-SXM4-80GB": 400,
    "A40": 300,
    "B200": 1000,
    "GeForce RTX 3090": 350,
    "GeForce RTX 4090": 450,
    "GeForce RTX 5090": 575,
    "H100 80GB HBM3": 700,
    "H100 PCIe": 350,
    "H200": 700,
    "Instinct MI300X": 750,
    "L4": 72,
    "L40S": 350,
    "RTX 6000 Ada Generation": 300,
    "RTX A6000": 300,
    "T4": 70,
    "V100-SXM2-16GB": 300,
    "V100-SXM2-32GB": 300,
}


class Energy(NamedTuple):
    """`parts` are triples of how many devices, what each is, and the watts of one."""

    watt_hours: float
    parts: list[tuple[int, str, int]]


def estimate_energy(hardware: dict[str, Any], seconds: float | None) -> Energy | None:
    """None where a run recorded no time or no hardware, or ran on an accelerator whose power is not known here.

    Args:
        hardware: the section of `run.json`; its `accelerators` and `cores` are those of one machine, its `processes`
            those of all.
        seconds: wall time.
    """
    if not seconds or not hardware.get("cores"):
        return None
    if accelerators := hardware.get("accelerators"):
        names = [name.removeprefix("NVIDIA ").removeprefix("Tesla ").removeprefix("AMD ") for name in accelerators]
        if not set(names) <= WATTS_PER_ACCELERATOR.keys():
            return None
        # Of a run on several machines, as many accelerators as processes.
        more = max(hardware.get("processes", 1) // len(names), 1)
        parts = [(more * names.count(name), name, WATTS_PER_ACCELERATOR[name]) for name in dict.fromkeys(names)]
    else:
        parts = [(hardware["cores"], "cores" if hardware["cores"] > 1 else "core", WATTS_PER_CORE)]
    watts = sum(number * each for number, _, each in parts)
    return Energy(watts * seconds / 3600, parts)
