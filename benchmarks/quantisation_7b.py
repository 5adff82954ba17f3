"""A large model of random weights: read into NF4, trained for a step, read again from the cache.

    python -m benchmarks.quantisation_7b --shape 7b --folder /large/disk

Writes a Llama-shaped base shard by shard (7b: 13.5 GB of bfloat16), then runs each part in a
process of its own, so that each peak is that part's alone: write nothing, load and quantise,
one QLoRA step, load from the cache.  The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lorakeet
from lorakeet.base.run_folder import write_text

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 512},
}  # fmt: skip
STARTER = Path(lorakeet.__file__).parent / "embedded" / "starter"
TOKENS = 512  # of a row at most


def write_base(folder: Path, shape: dict) -> int:
    """Random weights in bfloat16, one layer a shard; returns the parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for path in STARTER.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        groups.setdefault(parts[2] if "layers" in parts else "rest", []).append(name)
    shapes, places = {n: t.shape for n, t in model.state_dict().items()}, {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {n: (torch.randn(shapes[n]) * 0.02).bfloat16() for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(each.numel() for each in shapes.values())


def measure(part: str, base: str, cache: str, dtype: str) -> dict[str, float]:
    """Time and peak memory of one part, in this process."""
    if part == "step":
        found = train_one_step(base, cache)
    else:
        found = time_load(base, cache, dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found | {"peak_gib": peak / 2**30}


def time_load(base: str, cache: str, dtype: str) -> dict[str, float]:
    """Seconds of the imports, which any base costs, and of the loading itself."""
    started_s = time.perf_counter()
    import transformers.models.llama.modeling_llama  # noqa: F401

    from lorakeet.base.quantization_settings import QuantizationSettings
    from lorakeet.models.load import load_model

    imported_s = time.perf_counter()
    load_model(base, quantization=QuantizationSettings(kind="nf4", cache=cache), dtype=dtype)
    return {"import_s": imported_s - started_s, "load_s": time.perf_counter() - imported_s}


def train_one_step(base: str, cache: str) -> dict[str, float]:
    """A QLoRA run of one step, its layers computed again in the backward pass."""
    import lorakeet as lk
    from lorakeet.base.events import read_events

    work = Path(base).parent
    words = " ".join(f"word{number}" for number in range(TOKENS // 4))
    rows = [{"text": f"{number} {words}"} for number in range(8)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base": base,
        "data": {
            "train": str(work / "rows.jsonl"),
            "validation": 0,
            "deduplicate": False,
            "max_tokens": TOKENS,
        },
        "method": {"rank": 16},
        "quantization": {"kind": "nf4", "cache": cache},
        "train": {"batch_size": 1, "max_steps": 1, "gradient_checkpointing": "on"},
    }
    started_s = time.perf_counter()
    lk.train(recipe, work / "run")
    events = read_events(work / "run" / "events.jsonl")
    step = next(event for event in events if event["kind"] == "step")
    return {"run_s": time.perf_counter() - started_s, "step_s": step["duration_s"],
            "tokens": step["num_tokens"], "loss": step["loss"]}  # fmt: skip


def main() -> None:
    """Writes the base, runs each part in a fresh process and prints a line a part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--folder", type=Path, default=None, help="where there is room")
    parser.add_argument("--dtype", default="bfloat16", help="of what is not quantised")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--base", default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        cache = str(Path(asked.base).parent / "cache")
        print(json.dumps(measure(asked.part, asked.base, cache, asked.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        shape = SHAPES[asked.shape]
        H, F, L, V = (shape[k] for k in ("hidden_size", "intermediate_size",
                                         "num_hidden_layers", "vocab_size"))  # fmt: skip
        needed = 3 * (L * (4 * H * H + 3 * H * F) + 2 * V * H)
        if shutil.disk_usage(place).free < needed:
            sys.exit(f"{place}: {needed:,} bytes are needed. Name a larger disk with --folder.")
        parameters = write_base(Path(place) / "base", shape)
        lines = [f"# A Llama of {parameters:,} random weights in NF4 ({asked.shape})", ""]
        for part in ("load", "step", "reload"):
            command = [sys.executable, "-m", "benchmarks.quantisation_7b", "--part", part,
                       "--base", f"{place}/base", "--dtype", asked.dtype]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            figures = json.loads(done.stdout.strip().splitlines()[-1])
            told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
            lines.append(f"- {part}: {told}")
            print(lines[-1], flush=True)
    lines.append("")
    lines.append("Each part is a process of its own; `step` is a whole `lorakeet.train`.")
    lines.append(f"Made by `python -m benchmarks.quantisation_7b --shape {asked.shape}`.")
    write_text(RESULTS / f"quantisation_{asked.shape}.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
