"""verl's formula of FP8 blocks, run by Triton: reads BF16 matrices, writes their codes and scales.

    triton_reference.py IN OUT

IN holds one matrix after the other: rows and cols as two little-endian 32-bit numbers, then the elements.
OUT gets, in the same order, the codes of each matrix and then its F32 scales.
"""

import sys

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def quantize(x_ptr, codes_ptr, scales_ptr, rows, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * cols + col[None, :]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x)), 1e-10)
    scale = largest / 448.0
    codes = tl.minimum(tl.maximum(x * (1.0 / scale), -448.0), 448.0).to(tl.float8e4nv)
    tl.store(codes_ptr + at, codes, mask=inside)
    tl.store(scales_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


def main(source, target):
    data = numpy.fromfile(source, dtype=numpy.uint8)
    at = 0
    with open(target, "wb") as out:
        while at < len(data):
            rows, cols = (int(side) for side in data[at : at + 8].view("<u4"))
            at += 8
            elements = data[at : at + rows * cols * 2].copy()
            at += rows * cols * 2
            x = torch.from_numpy(elements).cuda().view(torch.bfloat16).reshape(rows, cols)
            grid = (triton.cdiv(rows, 128), triton.cdiv(cols, 128))
            codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
            scales = torch.empty(grid, dtype=torch.float32, device="cuda")
            quantize[grid](x, codes, scales, rows, cols, BLOCK=128)
            out.write(codes.view(torch.uint8).cpu().numpy().tobytes())
            out.write(scales.cpu().numpy().tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
