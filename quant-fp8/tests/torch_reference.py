"""Block FP8 quantisation written in torch operations, to compare the crate with.

Reads cases from a folder, one `NAME.in` each: a line `MODE TYPE ROWS COLS` and the elements. Writes
`NAME.codes` and `NAME.scales` (F32) beside them. Always casts to BF16 first, as verl does.

Run with `--prepare` once after installing torch: wheels for Linux are linked with CUDA libraries
that a comparison on the CPU never calls, and that are ten times as large as torch. This puts
libraries of their names beside torch's own, whose functions say that there is no device.
"""

import pathlib
import re
import subprocess
import sys
import sysconfig

BLOCK = 128


def prepare():
    lib = pathlib.Path(sysconfig.get_paths()["purelib"]) / "torch" / "lib"
    needed, functions, versions = set(), {}, {}
    for path in lib.glob("*.so*"):
        output = subprocess.run(
            ["readelf", "-W", "-d", "-V", "--dyn-syms", path], capture_output=True, text=True
        ).stdout
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", output))
        library = None
        for file, version in re.findall(r"File: (\S+)|  Name: (\S+)", output):
            library = file or library
            if version:
                versions.setdefault(library, set()).add(version)
        # Functions are bound when they are called, except for those whose address is taken.
        for function, version in re.findall(r" UND (_*(?:cu|nv|nccl)\w+)(?:@(\S+))?", output):
            functions.setdefault(version, set()).add(function)
    for name in needed:
        if not re.match(r"lib(cu|nv|nccl)", name) or (lib / name).exists():
            continue
        code, script = "", ""
        # Nothing tells which library a function without a version comes from: any will do.
        for version in versions.get(name, [""]):
            names = sorted(functions.get(version, ()))
            # 100 is "no device" to CUDA's runtime and to its driver: torch asks, and goes on without.
            code += "".join(f"int {function}(void) {{ return 100; }}\n" for function in names)
            if version:
                script += f"{version} {{ {' '.join(f'{n};' for n in names)} }};\n"
        command = ["cc", "-w", "-shared", "-x", "c", "-", "-o", lib / name]
        command.append(f"-Wl,-soname,{name}")
        if script:
            (lib / "versions").write_text(script)
            command.append(f"-Wl,--version-script={lib / 'versions'}")
        subprocess.run(command, input=code.encode(), check=True)


def scale_and_multiplier(mode, absmax):
    import torch

    one = torch.ones_like(absmax)
    if mode == "triton":
        scale = absmax.clamp(min=1e-10) / 448.0
        return scale, one / scale
    if mode == "pytorch":
        # A number divided by a tensor would be the tensor's reciprocal times the number: two roundings.
        multiplier = torch.full_like(absmax, 448.0) / absmax
        multiplier = torch.where(absmax == 0, one, multiplier)
        multiplier = torch.where(absmax == torch.inf, one, multiplier)
        return one / multiplier, multiplier
    assert mode == "ue8m0", mode
    bits = (absmax.clamp(min=1e-4) / 448.0).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    scale = (exponent.to(torch.int32) << 23).view(torch.float32)
    return scale, one / scale


def quantize(mode, x):
    import torch

    rows, cols = x.shape
    padding = (0, -cols % BLOCK, 0, -rows % BLOCK)
    x = torch.nn.functional.pad(x.to(torch.bfloat16).float(), padding)
    grid = (x.shape[0] // BLOCK, BLOCK, x.shape[1] // BLOCK, BLOCK)
    blocks = x.view(grid)
    absmax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale, multiplier = scale_and_multiplier(mode, absmax)
    codes = (blocks * multiplier).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).view(x.shape)[:rows, :cols].contiguous()
    return codes, scale.view(grid[0], grid[2])


def main(folder):
    import torch

    types = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
    for path in pathlib.Path(folder).glob("*.in"):
        head, data = path.read_bytes().split(b"\n", 1)
        mode, ty, rows, cols = head.decode().split()
        x = torch.frombuffer(bytearray(data), dtype=types[ty]).view(int(rows), int(cols))
        codes, scales = quantize(mode, x)
        path.with_suffix(".codes").write_bytes(bytes(codes.flatten().tolist()))
        scales = scales.contiguous().view(torch.uint8).flatten().tolist()
        path.with_suffix(".scales").write_bytes(bytes(scales))


if __name__ == "__main__":
    prepare() if sys.argv[1] == "--prepare" else main(sys.argv[1])
