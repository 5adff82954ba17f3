"""What a model answers to fixed prompts, measured alike here and in a fresh process.

A merge is only believed when a process that has never seen the adapter reads the
folder from disk and answers like base + adapter did in memory.  This file is
both sides of that comparison: the parent calls ``measure_outputs`` on the model
it holds, then runs

    python -m lorakeet.export.fresh FOLDER REQUEST.json ANSWER_FOLDER

whose child reads FOLDER and nothing else, and leaves its logits and texts in
ANSWER_FOLDER.  The child also hashes every tensor in the files, so that a flipped
bit too small to move a logit is found as well.

Shape letters:  T tokens of a prompt,  V vocabulary (or class labels).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakeet.base.errors import LorakeetError, MachineError
from lorakeet.base.records import Turn
from lorakeet.base.run_folder import read_json, write_json
from lorakeet.infer.generate import encode_prompt, generate
from lorakeet.infer.sampling import SamplingSettings
from lorakeet.models.load import load_model
from lorakeet.models.remote_code import FLAG, is_remote_code_trusted, trust_remote_code

MAX_PROMPT_TOKENS = 96
CHILD_TIMEOUT_S = 3600
SENTENCES = (
    "Once upon a time there was a little house at the edge of the forest.",
    "The contract ends on 31 December 2025, unless either party objects in writing.",
    "def area(width, height):\n    return width * height",
    "患者发热三天，伴有咳嗽和头痛，体温最高38.5度。",
    "根据合同法的规定，当事人应当按照约定全面履行自己的义务。",
)
QUESTIONS = (
    "What is the capital of France? Answer in one word.",
    "请用一句话介绍你自己。",
    "Summarise: the meeting moved from Monday to Tuesday because the room was taken.",
)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What one model answers to the fixed prompts.

    Args:
        prompts: token ids of each prompt.
        logits: float32, one [T, V] for each prompt; [1, V] for a classifier.
        texts: greedy continuations; empty for a classifier.
    """

    prompts: list[list[int]]
    logits: list[Tensor]
    texts: list[str]


@dataclass(frozen=True, kw_only=True)
class FreshRequest:
    """What the child is asked; it travels as JSON.

    Args:
        max_new_tokens: length of each greedy continuation.
    """

    task: str
    label_names: tuple[str, ...] = ()
    max_new_tokens: int = 24


def build_prompts(tokenizer: Any, *, max_tokens: int = MAX_PROMPT_TOKENS) -> list[list[int]]:
    """English and Chinese sentences and, where there is a template, chat prompts, as token ids."""
    prompts = [list(tokenizer(sentence)["input_ids"]) for sentence in SENTENCES]
    if getattr(tokenizer, "chat_template", None):
        turns = [(Turn(role="user", content=question),) for question in QUESTIONS]
        prompts += [list(encode_prompt(tokenizer, turn)) for turn in turns]
    return [prompt[:max_tokens] for prompt in prompts if prompt]


def measure_outputs(model: Any, tokenizer: Any, request: FreshRequest) -> Outputs:
    """Logits at every position of the fixed prompts, and greedy continuations.

    Args:
        model: put into evaluation mode; otherwise unchanged.

    Cost: one forward pass a prompt; 4 T V bytes are kept for each.
    """
    model.eval()
    window = int(getattr(model.config, "max_position_embeddings", None) or 2**20)
    max_tokens = max(1, min(MAX_PROMPT_TOKENS, window - request.max_new_tokens))
    prompts = build_prompts(tokenizer, max_tokens=max_tokens)
    logits = []
    with torch.inference_mode():
        for prompt in prompts:
            ids_BT = torch.tensor([prompt], device=model.device)
            output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
            logits.append(output.logits.reshape(-1, output.logits.shape[-1]).float().cpu())
    texts = []
    if request.task != "classify":
        settings = SamplingSettings(temperature=0.0, max_new_tokens=request.max_new_tokens)
        texts = [answer.text for answer in generate(model, tokenizer, prompts, settings)]
    return Outputs(prompts=prompts, logits=logits, texts=texts)


def sha256_tensor(tensor: Tensor) -> str:
    """Digest of a tensor's type, shape and bytes."""
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(head)
    digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def sha256_stored_tensors(folder: Path) -> dict[str, str]:
    """Digests of all tensors in a folder's safetensors files, by name."""
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (a handle, not a dictionary)
                digests[name] = sha256_tensor(file.get_tensor(name))
    return digests


def write_outputs(outputs: Outputs, folder: Path, *, digests: dict[str, str]) -> None:
    """Leaves outputs where the parent reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"logits.{n}": one.contiguous() for n, one in enumerate(outputs.logits)},
        folder / "logits.safetensors",
    )
    answer = {"prompts": outputs.prompts, "texts": outputs.texts, "tensors": digests}
    write_json(folder / "answer.json", answer)


def read_outputs(folder: Path) -> tuple[Outputs, dict[str, str]]:
    """What ``write_outputs`` left: the outputs and the digests of stored tensors."""
    answer = read_json(folder / "answer.json")
    logits = load_file(folder / "logits.safetensors")
    outputs = Outputs(
        prompts=answer["prompts"],
        logits=[logits[f"logits.{n}"] for n in range(len(logits))],
        texts=answer["texts"],
    )
    return outputs, answer["tensors"]


def run_fresh(folder: Path, request: FreshRequest, place: Path) -> str:
    """Asks a fresh process what the model in a folder answers; it may use nothing else.

    Args:
        place: an empty folder; ``read_outputs(place / "answer")`` then has the answers.

    Returns:
        why the process could not read the folder, or nothing.

    Raises:
        MachineError: it was killed, or did not end within an hour.
    """
    request_path = place / "request.json"
    write_json(request_path, asdict(request))
    command = [sys.executable, "-m", "lorakeet.export.fresh"]
    paths = [str(folder), str(request_path), str(place / "answer")]
    paths += [FLAG] if is_remote_code_trusted() else []
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # the folder must be enough
    try:
        done = subprocess.run(
            [*command, *paths],
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
            check=False,
            env={**os.environ, **offline},
        )
    except subprocess.TimeoutExpired as error:
        raise MachineError(
            f"The fresh process did not answer within {CHILD_TIMEOUT_S} s. Merge again on a "
            "machine with more memory."
        ) from error
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        raise MachineError(
            f"The fresh process was killed by signal {-done.returncode}, most often for want of "
            "memory. Merge again on a machine with more."
        )
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def main(arguments: list[str]) -> int:
    """The child: reads FOLDER, answers REQUEST.json into ANSWER_FOLDER."""
    is_trusted = FLAG in arguments
    folder, request_path, answer_folder = (Path(a) for a in arguments if a != FLAG)
    fields = json.loads(request_path.read_text(encoding="utf-8"))
    request = FreshRequest(**{**fields, "label_names": tuple(fields["label_names"])})
    torch.manual_seed(0)
    try:
        with trust_remote_code(is_trusted):
            model, tokenizer = load_model(
                str(folder), task=request.task, label_names=request.label_names, dtype="float32"
            )
        outputs = measure_outputs(model, tokenizer, request)
    except LorakeetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_outputs(outputs, answer_folder, digests=sha256_stored_tensors(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
