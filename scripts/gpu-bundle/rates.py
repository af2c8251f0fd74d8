"""Rates of plain products on the first card: what a step's arithmetic is held against. Usage: rates.py OUT.json"""
import json
import sys

import torch


def rate(multiply, operations, seconds=2.0):
    """Median rate in tera-operations a second of some 20 calls."""
    for _ in range(3):
        multiply()
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        multiply()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
        if sum(times) > seconds:
            break
    return operations / sorted(times)[len(times) // 2] / 1e12


# The largest product of elleci-1.5b: 16 x 1024 tokens through ffn.gate.
m, k, n = 16384, 2048, 5632
operations = 2 * m * k * n
a, b = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
p = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
q = torch.randint(-1, 2, (n, k), device="cuda", dtype=torch.int8)
result = {
    "device": torch.cuda.get_device_name(0),
    "torch": torch.__version__,
    "shape": [m, k, n],
    "bf16_tflops": rate(lambda: a @ b.T, operations),
    "int8_tops": rate(lambda: torch._int_mm(p, q.T), operations),
}
json.dump(result, open(sys.argv[1], "w"), indent=1)
print(json.dumps(result))
