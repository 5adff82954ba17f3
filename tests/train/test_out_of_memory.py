"""Memory runs out, and the same step is made in smaller pieces; nothing else changes."""

import json
import subprocess
import sys

import pytest
import torch

from lorakeet.base.errors import MachineError
from lorakeet.models.out_of_memory import is_out_of_memory
from lorakeet.train.checkpoint import read_newest_checkpoint
from tests.train.runs import make_job, make_model, make_recipe, run_job

ERRORS = {
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB."),
    "python": MemoryError,
}


def limit_tokens(model, most, error, *, in_training=True):
    """Lets the model refuse more than ``most`` tokens at once, as an allocator would."""

    def refuse(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if module.training is in_training and ids.numel() > most:
            raise error()

    model.transformer.register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def losses_of(heard):
    return [event["loss"] for event in heard.all("step")]


@pytest.mark.parametrize("kind", ERRORS)
def test_the_step_is_made_again_with_the_same_tokens_and_the_same_loss(tmp_path, kind):
    recipe = make_recipe(max_steps=5)
    _, whole = run_job(make_job(tmp_path / "whole", recipe))
    model = limit_tokens(make_model(), 40, ERRORS[kind])
    _, halved = run_job(make_job(tmp_path / "halved", recipe, model=model))
    alarms = [a for a in halved.all("alarm") if a["code"] == "out-of-memory"]
    assert alarms and alarms[-1]["micro_batch_tokens"] <= 40
    assert {alarm["step"] for alarm in alarms} == {1}, "the size that fitted was not kept"
    assert losses_of(halved) == pytest.approx(losses_of(whole), rel=1e-5)
    for key in ("num_tokens", "num_targets"):
        assert [e[key] for e in halved.all("step")] == [e[key] for e in whole.all("step")]
    assert not [a for a in whole.all("alarm") if a["code"] == "out-of-memory"]


def test_gradients_of_the_failed_attempt_are_not_counted_twice(tmp_path):
    """The third micro-batch fails once, after two have left their gradients."""
    recipe = make_recipe(max_steps=2, micro_batch_tokens=30)
    _, whole = run_job(make_job(tmp_path / "whole", recipe))
    calls = []

    def fail_third(module, args, kwargs):
        calls.append(module.training)
        if sum(calls) == 3 and calls[-1]:
            raise ERRORS["cpu"]()

    model = make_model()
    model.transformer.register_forward_pre_hook(fail_third, with_kwargs=True)
    _, halved = run_job(make_job(tmp_path / "halved", recipe, model=model))
    assert len([a for a in halved.all("alarm") if a["code"] == "out-of-memory"]) == 1
    norms = [[e["gradient_norm"] for e in heard.all("step")] for heard in (halved, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_resumed_run_goes_on_with_the_size_that_fitted(tmp_path):
    recipe = make_recipe(max_steps=6)
    make = lambda: limit_tokens(make_model(), 40, MemoryError)  # noqa: E731
    through, _ = run_job(make_job(tmp_path / "through", recipe, model=make()))
    run_job(make_job(tmp_path / "cut", recipe, model=make()), stop_at=3)
    kept = read_newest_checkpoint(tmp_path / "cut" / "checkpoints", print)
    assert kept.progress["micro_batch_tokens"] <= 40
    _, heard = run_job(make_job(tmp_path / "cut", recipe, model=make(), resume=True))
    assert not heard.all("alarm")
    ends = [
        read_newest_checkpoint(tmp_path / name / "checkpoints", print).trained
        for name in ("through", "cut")
    ]
    assert through.steps == 6
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_one_sample_that_does_not_fit_is_refused_with_the_remedy(tmp_path):
    model = limit_tokens(make_model(), 3, MemoryError)
    with pytest.raises(MachineError, match=r"single sample of \d+ tokens.*data.max_tokens"):
        run_job(make_job(tmp_path, make_recipe(max_steps=2), model=model))


def test_a_sample_that_does_not_fit_is_computed_with_less_kept(tmp_path):
    """``auto`` goes on with layers that are computed again, and a resumed run goes on so."""
    recipe = make_recipe(max_steps=4)
    whole, first = run_job(make_job(tmp_path / "whole", recipe))

    def make():
        model = make_model()

        def refuse(module, args, kwargs):
            if module.training and "forward" not in module.h[0].__dict__:
                raise MemoryError

        model.transformer.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    run_job(make_job(tmp_path / "cut", recipe, model=make()), stop_at=2)
    _, heard = run_job(make_job(tmp_path / "cut", recipe, model=make(), resume=True))
    assert not heard.all("alarm") and whole.steps == 4
    assert losses_of(heard) == pytest.approx(losses_of(first)[2:], rel=1e-5)
    off = make_recipe(max_steps=1, gradient_checkpointing="off")
    with pytest.raises(MachineError, match="single sample.*gradient_checkpointing: auto"):
        run_job(make_job(tmp_path / "off", off, model=make()))


def test_memory_that_runs_out_in_the_optimiser_is_no_reason_to_make_the_step_again(tmp_path):
    job = make_job(tmp_path, make_recipe(max_steps=2))
    original, calls = torch.optim.AdamW.step, []

    def fail(self, *args, **kwargs):
        calls.append(1)
        raise MemoryError

    torch.optim.AdamW.step = fail
    try:
        with pytest.raises(MachineError, match="adamw-8bit.*newest checkpoint"):
            run_job(job)
    finally:
        torch.optim.AdamW.step = original
    assert len(calls) == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    model = limit_tokens(make_model(), 3, lambda: RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_job(make_job(tmp_path, make_recipe(max_steps=2), model=model))
    assert not is_out_of_memory(ValueError("out of memory"))


CHILD = """
import json, resource, sys
from pathlib import Path
import torch, transformers as t
from tests.train.runs import make_job, make_recipe, run_job

torch.set_num_threads(1)
config = t.GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=64, n_positions=32,
                      bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
recipe = make_recipe(batch_size=1024, max_steps=1, learning_rate=1e-4,
                     micro_batch_tokens=40_000, evaluate_every_steps=99)
_, most = resource.getrlimit(resource.RLIMIT_AS)
found = {}
for kind in ("limited", "free"):
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    torch.manual_seed(0)
    job = make_job(Path(sys.argv[1]) / kind, recipe, model=t.GPT2LMHeadModel(config))
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = held + (300 << 20) if kind == "limited" else most
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    _, heard = run_job(job)
    found[kind] = {"losses": [e["loss"] for e in heard.all("step")],
                   "alarms": [a["code"] for a in heard.all("alarm")]}
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
def test_a_real_allocator_that_refuses_leads_to_the_same_losses(tmp_path):
    """13,000 tokens at once need more than the 300 MiB that the limit leaves."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "out-of-memory" in found["limited"]["alarms"]
    assert "out-of-memory" not in found["free"]["alarms"]
    assert found["limited"]["losses"] == pytest.approx(found["free"]["losses"], rel=1e-5)
