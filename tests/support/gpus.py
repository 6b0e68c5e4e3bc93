"""GPUs, as the CUDA planner describes them (csrc/cuda/plan.h)."""

from __future__ import annotations

KB = 1024
H100 = {
    "name": "H100",
    "architecture": 90,
    "sms": 132,
    "shared_memory": 227 * KB,
    "clock": 1.755,
    "memory_bandwidth": 3350.0,
    "clusters": [132, 66, 33, 16, 8],
}
H200 = {
    **H100,
    "name": "H200",
    "clock": 1.98,
    "memory_bandwidth": 4814.0,
    "clusters": [132, 66, 30, 15, 7],  # GPCs of uneven size
}
A100 = {
    "name": "A100",
    "architecture": 80,
    "sms": 108,
    "shared_memory": 163 * KB,
    "clock": 1.41,
    "memory_bandwidth": 1555.0,
    "clusters": [108, 0, 0, 0, 0],
}
RTX4090 = {
    "name": "RTX 4090",
    "architecture": 89,
    "sms": 128,
    "shared_memory": 99 * KB,
    "clock": 2.52,
    "memory_bandwidth": 1008.0,
    "clusters": [128, 0, 0, 0, 0],
}
T4 = {
    "name": "T4",
    "architecture": 75,
    "sms": 40,
    "shared_memory": 64 * KB,
    "clock": 1.59,
    "memory_bandwidth": 320.0,
    "clusters": [40, 0, 0, 0, 0],
}
TINY = {
    "name": "tiny",
    "architecture": 90,
    "sms": 8,
    "shared_memory": 48 * KB,
    "clock": 1.0,
    "memory_bandwidth": 64.0,
    "clusters": [8, 4, 2, 0, 0],
}
