"""What a layer's pass is said to take at most, against what passes of real models take: never more, and not many times less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cases import first_here

ROOT = Path(__file__).resolve().parents[2]
POSITIONS = 4096
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 4096,
}
WIDE = {"num_experts_per_tok": 4, "num_experts": 16, "moe_intermediate_size": 256, "head_dim": 64}
CASES = [
    # family, its values, how many times the bound may be what was measured: wide where the processor's own attention or
    # experts take less than is said of the worst way to compute them
    ("Llama", SIZES, 3.5),
    ("Qwen3Moe", SIZES | WIDE, 4.0),
    ("GPT2", {"n_embd": 512, "n_layer": 2, "n_head": 8, "vocab_size": 260, "n_positions": 4096}, 2.5),
    ("Gemma2", SIZES | {"head_dim": 64}, 4.0),
    ("GptOss", SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64}, 3.5),
]

SCRIPT = """
import ctypes, json, sys, threading
import torch, transformers
from outliers.model.families import expert_counts
from outliers.model.sites import find_backbone
from outliers.model.activations import activation_memory
family, values, positions = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
config = getattr(transformers, f"{family}Config")(**values)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
base = model.get_submodule(find_backbone(model))
layers = next(n for n, m in base.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
work = activation_memory(model, f"{find_backbone(model)}.{layers}", expert_counts(config.get_text_config()))

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

ids = torch.arange(positions)[None] % 250
eager = model.config._attn_implementation == "eager"
with torch.inference_mode():
    base(input_ids=ids[:, :512], use_cache=False)  # what libraries allocate once
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins here
    before = status("VmRSS")
    base(input_ids=ids, use_cache=False)
    taken = status("VmHWM") - before
print(json.dumps({"taken": taken, "bound": work.bytes(1, positions, 4, eager=eager, padded=False)}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of one pass is read from Linux's /proc"
)
@pytest.mark.parametrize(("family", "values", "loose"), first_here(CASES), ids=[case[0] for case in CASES])
def test_a_pass_takes_what_is_planned_for_it_at_most(family, values, loose):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([family, values, POSITIONS])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["taken"] > 4 * POSITIONS * 512 * 4, "the pass left no mark: nothing was measured"
    assert found["taken"] <= found["bound"] <= loose * found["taken"], found
