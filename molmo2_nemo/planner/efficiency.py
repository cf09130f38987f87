"""What is assumed about devices, links and hosts: one table of two columns. Imports no torch.

A prediction is a range, one end for each column. FAST: dense decoders are published at 33 to 46 % of an H100's peak in
all (torchtitan's and fms-fsdp's own figures), which takes products at about this speed. SLOW: `decoder_attention` and
`unevenness` were chosen so that none of the nine runs in PUBLISHED took longer; the rest of both columns is assumed, or
named below. Nothing was measured with this project on a GPU; `--measured` replaces what tools/bench/gpu.py measured.
"""

from dataclasses import dataclass

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Assumptions:
    """One column of the table. Shares are of a device's peak (flops.PEAK_TFLOPS, DEVICES)."""

    # Matrix products and attention; attention by the pairs that its mask lets through.
    vit: float
    vit_attention: float
    pooling: float
    pooling_attention: float
    projector: float
    decoder: float
    decoder_attention: float
    head: float
    fp8_decoder: float  # of the FP8 peak
    half_speed_at: float  # rows or columns of a product at which it has half of that speed: m / (m + this)
    # Memory and links.
    memory: float  # of the device's memory bandwidth: element-wise operations and the optimizer
    node_link: float
    network: float
    node_latency: float  # seconds for each further rank of a collective inside a node
    network_latency: float  # ... and across nodes
    launch: float  # seconds for a collective of any size
    # Replicas, host, storage.
    unevenness: float  # standard deviation of a row's work, over its mean
    pcie: float  # bytes/s between host and device
    host_adam: float  # parameters/s
    frame_seconds: float  # of a core, to decode and resize a video frame
    crop_seconds: float  # ... a crop of an image
    frame_bytes: float  # of the file that a frame is from
    crop_bytes: float
    storage: float  # bytes/s of a node, reading or writing
    storage_of_all: float  # ... of all nodes together
    # Of what is computed from the above; not 1 where it was measured.
    vision_factor: float = 1.0
    decoder_factor: float = 1.0


FAST = Assumptions(
    vit=0.55,
    vit_attention=0.35,
    pooling=0.40,
    pooling_attention=0.05,
    projector=0.50,
    decoder=0.60,
    decoder_attention=0.30,
    head=0.45,
    fp8_decoder=0.45,
    half_speed_at=64,
    memory=0.85,
    node_link=0.80,
    network=0.85,
    node_latency=1e-6,
    network_latency=4e-6,
    launch=10e-6,
    unevenness=0.03,
    pcie=50e9,
    host_adam=2e9,
    frame_seconds=0.010,
    crop_seconds=0.0024,
    frame_bytes=45e3,
    crop_bytes=40e3,
    storage=5e9,
    storage_of_all=100e9,
)
SLOW = Assumptions(
    vit=0.40,
    vit_attention=0.15,
    pooling=0.25,
    pooling_attention=0.03,
    projector=0.35,
    decoder=0.45,
    decoder_attention=0.06,
    head=0.30,
    fp8_decoder=0.25,
    half_speed_at=128,
    memory=0.70,
    node_link=0.60,
    network=0.60,
    node_latency=3e-6,
    network_latency=10e-6,
    launch=30e-6,
    unevenness=0.05,
    pcie=20e9,
    host_adam=0.7e9,
    frame_seconds=0.033,
    crop_seconds=0.004,
    frame_bytes=160e3,
    crop_bytes=80e3,
    storage=1e9,
    storage_of_all=10e9,
)

# (bytes/s of memory, bytes/s and direction to the other GPUs of a node) by the driver's name. Data sheets, as those in
# flops.py; where there is no NVLink, or between pairs only, PCIe x16: 4.0 has 32 GB/s, 5.0 64 GB/s.
DEVICES = {
    "NVIDIA A100-SXM4-40GB": (1.555e12, 300e9),
    "NVIDIA A100-SXM4-80GB": (2.039e12, 300e9),
    "NVIDIA A100-PCIE-40GB": (1.555e12, 32e9),
    "NVIDIA A100 80GB PCIe": (1.935e12, 32e9),
    "NVIDIA H100 80GB HBM3": (3.35e12, 450e9),
    "NVIDIA H100 PCIe": (2.0e12, 64e9),
    "NVIDIA H100 NVL": (3.9e12, 64e9),
    "NVIDIA H200": (4.8e12, 450e9),
    "NVIDIA H200 NVL": (4.8e12, 64e9),
    "NVIDIA GH200 480GB": (4.0e12, 450e9),
    "NVIDIA B200": (8.0e12, 900e9),
    "NVIDIA GB200": (8.0e12, 900e9),
    "NVIDIA L40S": (0.864e12, 32e9),
    "NVIDIA L4": (0.3e12, 32e9),
}
NETWORK = 50e9  # bytes/s and direction of a GPU: one 400 Gb/s port each

# Seconds of a core for pictures: tools/bench/data.py (docs/benchmarks.md), 0.8 videos of 121 frames in 360p and 0.5 of
# 61 frames in 720p, 59 images of 7 crops a second; the files' bytes are assumed, 0.7 and 2.5 Mbit/s of video.


@dataclass(frozen=True)
class Published:
    """A training run of arXiv 2601.10611, table 14, on H100. workers: of a loader, in the public launch scripts."""

    model: str
    stage: str
    gpus: int
    hours: float
    steps: int
    workers: int

    @property
    def seconds(self) -> float:
        """Of a step, with whatever evaluations and checkpoints the hours hold."""
        return self.hours * 3600 / self.steps


PUBLISHED = (
    Published("molmo2_4b", "stage1", 32, 15.2, 32000, 2),
    Published("molmo2_o_7b", "stage1", 64, 11.3, 32000, 2),
    Published("molmo2_8b", "stage1", 64, 12.1, 32000, 2),
    Published("molmo2_4b", "stage2", 128, 58.8, 30000, 6),
    Published("molmo2_o_7b", "stage2", 128, 59.3, 30000, 6),
    Published("molmo2_8b", "stage2", 128, 63.0, 30000, 6),
    Published("molmo2_4b", "stage3", 128, 25.3, 2000, 4),
    Published("molmo2_o_7b", "stage3", 128, 25.7, 2000, 4),
    Published("molmo2_8b", "stage3", 128, 26.0, 2000, 4),
)
