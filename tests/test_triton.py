"""The Triton kernels without a GPU: run by triton's interpreter, and compiled for devices.

The cases are in triton_cases.py. Compiling needs no device: it shows that each kernel has code for the
generations that `supports` lets in, that the products are on the tensor cores and that two tiles fit a
multiprocessor of Hopper.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae_runtime.triton_encode import FEATURES, TOKENS, launch

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
OVER = {
    "W": "*fp16", "X": "*fp16", "w_part": "i32", "x_part": "i32", "w_unit": "*fp32", "x_unit": "*fp32",
    "depth": "i32", "bias": "*fp32", "floor": "*fp32", "gain": "*fp32", "shift": "*fp32", "words": "*i32",
    "total": "*i64", "counts": "*i32", "begins": "*i64", "capacity": "i32", "tokens": "i32", "blocks": "i32",
    "pre": "*fp32", "ranks": "*fp32", "least_out": "*i32", "last_out": "*i32", "least_in": "*i32",
    "last_in": "*i32", "width": "i32", "padded": "i32", "k": "i32", "offset": "i32", "sizes": "*i64",
    "ahead": "*i64", "token_out": "*i32", "code_out": "*i16",
}  # fmt: skip


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton_cases.py"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


PARTS = [(1, 1), (2, 1), (2, 2)]
COMPILED: list[tuple[int, str, dict[str, Any]]] = [
    *((90, "_threshold_kernel", {"W_PARTS": w, "X_PARTS": x, "AFFINE": w == x}) for w, x in PARTS),
    *((arch, "_threshold_kernel", {"W_PARTS": 2, "X_PARTS": 1, "AFFINE": False}) for arch in (80, 100, 120)),
    (90, "_product_kernel", {"W_PARTS": 2, "X_PARTS": 1}),
    (90, "_ranked_kernel", {"SCALED": True, "ABSOLUTE": False, "SIGNED": False}),
    (100, "_ranked_kernel", {"SCALED": False, "ABSOLUTE": True, "SIGNED": True}),
    (90, "_select_kernel", {"SCALED": True, "ABSOLUTE": True, "SINGLE": True, "BLOCK": 32768}),
    (90, "_select_kernel", {"SCALED": False, "ABSOLUTE": False, "SINGLE": False, "BLOCK": 1024}),
    (90, "_move_kernel", {"ROWS": 1024}),
]


@needs_triton
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize(("arch", "name", "constants"), COMPILED)
def test_the_kernels_compile(
    arch: int,
    name: str,
    constants: dict[str, Any],
    one: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`one`: a token, a feature or a block of one is a constant to triton, which is another program."""
    if one and "W_PARTS" in constants and arch != 90:
        pytest.skip("compiled for one device")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sae_runtime import triton_encode

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options: dict[str, Any] = {"num_warps": 8}
    constants = dict(constants)
    if "W_PARTS" in constants:
        options = launch(constants["W_PARTS"] + constants["X_PARTS"])
        constants |= {name: options.pop(name) for name in ("BF", "BT", "BK")} | {"BANDS": 128}
    elif name != "_select_kernel":
        constants |= {"BF": FEATURES, "BT": TOKENS}
    kernel = getattr(triton_encode, name)
    if one:
        constants |= {each: 1 for each in ("tokens", "blocks", "width", "k") if each in kernel.arg_names}
    names = kernel.arg_names
    signature = {each: "constexpr" if each in constants else OVER[each] for each in names}
    aligned = {"depth", "w_part", "x_part", "padded"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, each in enumerate(names)
        if signature[each].startswith("*") or each in aligned
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    if "W_PARTS" in constants:
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}[arch]
        assert instruction in compiled.asm["ptx"]
        assert compiled.metadata.shared <= (99 if arch in (80, 120) else 113) << 10
        assert "fma.rn.f32" not in compiled.asm["ptx"]


def test_without_triton_the_torch_operators_take_over() -> None:
    code = """
    import sys
    sys.modules["triton"] = None
    import torch
    from sae_runtime import encode, triton_encode
    from sae_runtime.sae import SaeWeights
    sae = SaeWeights("relu", torch.ones(2, 3), torch.zeros(3))
    assert not triton_encode.supports(sae)
    assert encode.Encoder(sae, torch.device("cpu")).encode(torch.ones(1, 2)).rows == 3
    """
    subprocess.run([sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))], cwd=ROOT, check=True)


def test_the_benchmark_runs_small_without_ray_and_duckdb(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['ray'] = sys.modules['duckdb'] = None; "
        f"sys.argv = 'gpu.py --small --device cpu --repeat 1'.split() + ['--folder', {str(tmp_path)!r}]; "
        "sys.path.insert(0, '.'); runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["saes"], found["features"], found["encoder"]) == (6, 6 * 512, "torch")
    assert 4 <= found["l0"] <= 16
    assert 1900 <= found["scan_tokens"] <= 2048
    assert found["scan_rows"] == round(found["l0"] * found["scan_tokens"] * 6)
    rates = [value for name, value in found.items() if name.endswith(("second", "share", "tflops"))]
    assert len(rates) == 8
    assert all(rate > 0 for rate in rates)
    assert not list(tmp_path.iterdir())


def test_the_benchmark_has_the_published_model() -> None:
    """Gemma 2 2B has 2,614,341,888 parameters, and its 78 SAEs 5.7 GFLOP a token."""
    module = runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with torch.device("meta"):
        model = Gemma2ForCausalLM(Gemma2Config(**module["GEMMA_2_2B"].model))
    assert sum(p.numel() for p in model.parameters()) == 2_614_341_888
    infos = module["sae_infos"](module["GEMMA_2_2B"])
    assert len(infos) == 78
    assert sum(2 * info.d_in * info.width for info in infos) == pytest.approx(5.7e9, rel=0.01)
