# SPDX-License-Identifier: Apache-2.0
"""The kernels as a device that is not here would get them: their PTX, and what its assembler says of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_ADDRESSES = ("planes", "pages", "slots")


@dataclass(frozen=True, slots=True)
class Compiled:
    """`accesses` of global memory by instruction, such as `ld.global.v2.b64`."""

    accesses: Counter[str]
    spilled_bytes: int


def compiled(
    kernel: Callable[..., None], numbers: Mapping[str, int], constants: Mapping[str, object], arch: int, into: Path
) -> Compiled:
    """`kernel`, launched as the code launches it; `numbers` are those that it takes, in order."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    made = triton.JITFunction(kernel, do_not_specialize=list(numbers))
    known = {name: value for name, value in constants.items() if name != "num_warps"}
    wide = {name: "i64" if name in _ADDRESSES or value >= 1 << 31 else "i32" for name, value in numbers.items()}
    source = ASTSource(
        fn=made,
        signature={**wide, **dict.fromkeys(known, "constexpr")},
        constexprs={(made.arg_names.index(name),): value for name, value in known.items()},
    )
    options = {"num_warps": constants["num_warps"]}
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    (into / "kernel.ptx").write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=into, check=True, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills, said
    return Compiled(Counter(re.findall(r"(?:ld|st)\.global[.\w]*", ptx)), int(spills[1]) + int(spills[2]))
