"""Our `grpo` against TRL's `GRPOTrainer`: the same model, completions and rewards give the same loss and gradients."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import shoestring
from batches import collate
from shoestring.adapters.on_peft import PeftHandle
from shoestring.algorithms import ALGORITHMS
from shoestring.model.policy import Policy
from shoestring.objectives.base import Tokens
from shoestring.objectives.loss import Objective, objective_loss
from shoestring.types import Completion, Group, Problem, Prompt, Score

trl = pytest.importorskip("trl", reason="the comparison needs TRL, which only the test extra installs")

pytestmark = [
    # PEFT and TRL still use what Transformers now calls activation checkpointing.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning"),
]

VOCAB, EOS, LIMIT = 50, 2, 9
PROMPTS = ((5, 6, 7, 8, 9), (11, 12), (21, 22, 23))
LENGTHS = ((9, 4, 1, 6), (3, 9, 7, 5), (2, 8, 3, 3))
REWARDS = ((1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.3, 1.0), (0.1, 0.1, 0.1, 0.1))  # the last group has no signal

# What a loss type of TRL is called here.
OURS = {
    "grpo": {"loss_agg": "seq_mean_token_mean", "eps": 1e-4},
    "dr_grpo": {"advantage": "centred", "loss_agg": "token_sum_norm", "norm_length": LIMIT},
    "bnpo": {"loss_agg": "token_mean", "eps": 1e-4},
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(shoestring.__file__).parent / "tiny" / "model")


@pytest.fixture(scope="module")
def adapted():
    """A random two-layer model with a LoRA whose B is not 0, so that policy and reference differ."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def trainer(adapted, tokenizer, tmp_path_factory):
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=LIMIT,
        # TRL's own correction multiplies the KL term by the ratio, which the paper does not.
        use_bias_correction_kl=False,
    )
    built = trl.GRPOTrainer(
        model=copy.deepcopy(adapted),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 4}),
        processing_class=tokenizer,
    )
    built.current_gradient_accumulation_steps = 1
    return built


@pytest.fixture(scope="module")
def completions():
    """Random tokens; those shorter than the limit end with the end token. [3][4][length]"""
    generator = torch.Generator().manual_seed(1)

    def completion(length):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        return tuple(ids if length == LIMIT else [*ids[:-1], EOS])

    return [[completion(length) for length in lengths] for lengths in LENGTHS]


@pytest.fixture(scope="module")
def padded(trainer, completions):
    """The rows as TRL lays them out (prompts padded left, completions right), with old and reference log-probs."""
    prompts = [torch.tensor(prompt) for prompt in PROMPTS for _ in range(4)]
    rows = [torch.tensor(row) for group in completions for row in group]

    def pad(rows, side):
        masks = [torch.ones_like(row) for row in rows]
        return [torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side=side) for x in (rows, masks)]

    inputs = dict(
        zip(
            ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
            pad(prompts, "left") + pad(rows, "right"),
            strict=True,
        )
    )

    def logps():
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, LIMIT)[0]

    with torch.no_grad():
        noise = torch.randn(len(rows), LIMIT, generator=torch.Generator().manual_seed(2))
        inputs["old_per_token_logps"] = logps() + 0.3 * noise
        with trainer.model.disable_adapter():
            inputs["ref_per_token_logps"] = logps()
    return inputs


def their_gradient(trainer, inputs, loss_type, beta):
    """Loss and gradients of TRL, whose advantages are written out here."""
    rewards = torch.tensor(REWARDS)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if loss_type != "dr_grpo":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    trainer.loss_type, trainer.beta = loss_type, beta
    return gradient(
        trainer.model, [trainer._compute_loss(trainer.model, inputs | {"advantages": advantages.flatten()})]
    )


def our_gradient(adapted, tokenizer, completions, old, loss_type, beta, on_policy, **correction):
    groups = [
        Group(
            Prompt(Problem(f"p{g}", "", ""), PROMPTS[g], len(PROMPTS[g])),
            tuple(
                Completion(ids, tuple(old[4 * g + i, : len(ids)].tolist()), "end" if ids[-1] == EOS else "length")
                for i, ids in enumerate(completions[g])
            ),
            tuple(Score(value) for value in REWARDS[g]),
        )
        for g in range(len(PROMPTS))
    ]
    algorithm = ALGORITHMS["grpo"](**OURS[loss_type])
    credits = [algorithm.credit(group, torch.Generator()) for group in groups]
    policy = Policy(adapted.get_base_model(), tokenizer, PeftHandle(None, adapted, frozenset()))
    objective = Objective(beta=beta, clip_low=0.2, clip_high=0.2, updates=1, l2=0.0, **correction)
    losses, clipped, capped = [], 0, 0
    for batch in collate(groups, credits, normalise=algorithm.normalise, beta=beta, max_tokens=40):
        reference = None
        if beta:
            with policy.reference():
                reference = policy.logprobs(batch)
        logprob = policy.logprobs(batch)
        before = logprob.detach() if on_policy else batch.sampler_logprob
        loss, metrics = objective_loss(Tokens(logprob, before, reference, batch.row), batch.columns, objective)
        losses.append(loss)
        clipped += metrics["clip_fraction"].total.item()
        capped += metrics["importance_capped"].total.item() if correction else 0
    assert len(losses) > 1
    assert (clipped == 0) == on_policy
    assert (capped > 0) == bool(correction)
    return gradient(adapted, losses)


def gradient(model, losses):
    """The sum of the losses, and the gradient of each trained parameter by name."""
    model.zero_grad()
    total = sum(losses)
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "clipped"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", OURS)
def test_grpo_has_the_loss_and_the_gradients_of_trl(
    adapted, tokenizer, trainer, completions, padded, loss_type, beta, on_policy
):
    inputs = {key: value for key, value in padded.items() if not (on_policy and key == "old_per_token_logps")}
    theirs, their_gradients = their_gradient(trainer, inputs, loss_type, beta)
    ours, our_gradients = our_gradient(
        adapted, tokenizer, completions, padded["old_per_token_logps"], loss_type, beta, on_policy
    )
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert_same(our_gradients, their_gradients)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert max(grad.abs().max() for grad in theirs.values()) > 1e-3
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def corrected_inputs(trainer, completions, sampler_logprobs, monkeypatch):
    """What TRL makes of completions that vLLM is said to have sampled, its own correction included."""
    rows = [row for group in completions for row in group]
    logprobs = [sampler_logprobs[i, : len(row)].tolist() for i, row in enumerate(rows)]
    prompts = [list(prompt) for prompt in PROMPTS for _ in range(4)]
    texts = [""] * len(rows)
    sampled = (prompts, list(map(list, rows)), None, texts, logprobs, {}, None, None)
    monkeypatch.setattr(trainer, "_generate", lambda _: sampled)
    padding = copy.deepcopy(trainer._tokenizer)
    padding.pad_token_id = 0  # its own is beyond this model's vocabulary
    monkeypatch.setattr(trainer, "_tokenizer", padding)
    return trainer._generate_and_score_completions([{"prompt": "1+1="} for _ in rows])


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_corrections_are_those_of_trl(
    adapted, tokenizer, trainer, completions, padded, mode, beta, monkeypatch
):
    settings = {"use_vllm": True, "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.5}
    for name, value in {**settings, "beta": beta, "vllm_importance_sampling_correction": True}.items():
        monkeypatch.setattr(trainer, name, value)
    sampler_logprobs = padded["old_per_token_logps"]
    inputs = corrected_inputs(trainer, completions, sampler_logprobs, monkeypatch)
    theirs, their_gradients = their_gradient(trainer, inputs, "grpo", beta)
    correction = {"importance_correction": mode.replace("_", "-"), "importance_cap": 1.5}
    ours, our_gradients = our_gradient(
        adapted, tokenizer, completions, sampler_logprobs, "grpo", beta, True, **correction
    )
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert_same(our_gradients, their_gradients)
