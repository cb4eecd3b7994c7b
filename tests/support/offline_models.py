"""The models of `sweeps/offline.toml`, made by code where there is no network: `python -m tests.support.offline_models FOLDER`.

SmolLM2's own activations in an MoE (its MLP copied into each of four experts, a random router: the routing means
nothing), and tiny random ones of other families. Made once: a folder that is there is left alone.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

from outliers.model.gguf import gguf_weights
from outliers.model.source import find_model
from outliers.spec import ModelSpec
from outliers.workspace import Workspace, open_workspace
from tests.support import tiny

EXPERTS, CHOSEN = 4, 2
SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    "hidden_act",
)  # fmt: skip
"""What both configs have alike."""
TINY = {"tiny-qwen3-moe": "Qwen3Moe", "tiny-gpt-oss": "GptOss"}


def make_moe(folder: Path, workspace: Workspace) -> None:
    """Save SmolLM2 as a Mixtral in bfloat16, 373 million parameters, with its own tokenizer."""
    source = gguf_weights(find_model(ModelSpec(id="builtin:smollm2"), workspace), workspace)
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    values = {name: getattr(dense.config, name) for name in SAME}
    config = transformers.MixtralConfig(
        **values,
        head_dim=dense.config.head_dim,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        sliding_window=None,
    )
    torch.manual_seed(0)
    moe = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kept = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    moe.load_state_dict(kept, strict=False)
    with torch.no_grad():
        for wide, plain in zip(moe.model.layers, dense.model.layers, strict=True):
            own = plain.mlp
            wide.mlp.experts.gate_up_proj.copy_(torch.cat([own.gate_proj.weight, own.up_proj.weight]))
            wide.mlp.experts.down_proj.copy_(own.down_proj.weight)
            wide.mlp.gate.weight.normal_(std=0.02)
    moe.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def make_models(folder: Path, workspace: Workspace | None = None) -> None:
    """Make every model of the offline sweep below `folder`. `workspace`: one where SmolLM2 is converted already."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as scratch:
        for name in ("smollm2-moe", *TINY):
            if (folder / name).exists():
                continue
            made = Path(scratch) / name
            if name in TINY:
                tiny.make_model(made, TINY[name], dtype="bfloat16")
            else:
                make_moe(made, workspace or open_workspace(Path(scratch) / "workspace"))
            made.rename(folder / name)


if __name__ == "__main__":
    make_models(Path(sys.argv[1]))
