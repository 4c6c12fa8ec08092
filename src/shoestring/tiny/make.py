"""Makes the embedded default model: a byte-level Qwen2 of 0.8 M parameters that mostly guesses products, and can work
them out.

    python -m shoestring.tiny.make OUT_FOLDER [MINUTES]

Three of four training texts state the product at once, one works it out step by step; all come from the train split of
the multiplication task. So, as in a real base model, the better way of answering is there and is not the usual one,
and reinforcement learning has something to find. Everything is seeded; minutes, not steps, bound the run, so the
weights differ from machine to machine.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from shoestring.tasks.multiplication import Multiplication

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORKED_SHARE = 0.25
BATCH = 256
PEAK_LR = 2e-3


def special(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(name))  # type: ignore[arg-type]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (so one a digit), and five special ones."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    end, pad_id = special(tokenizer, "<|end|>"), special(tokenizer, "<|pad|>")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad_id)
    return model


def example(
    tokenizer: PreTrainedTokenizerFast, task: Multiplication, index: int, worked: bool
) -> tuple[list[int], int]:
    """Token ids of question and answer, and where the answer starts."""
    problem = task.draw("train", index)
    answer = task.solution(problem) if worked else f"#### {problem.answer}"
    prompt = tokenizer.encode(f"<|user|>{problem.question}<|assistant|>")
    return prompt + tokenizer.encode(f"{answer}<|end|>"), len(prompt)


def pad(rows: list[tuple[list[int], int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, [B, L]; labels are -100 on prompts and padding."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return ids, labels


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seconds: float, device: str) -> None:
    """Plain next-token training for `seconds`, with a cosine schedule over them."""
    task, random, pad_id = Multiplication(), Random(0), special(tokenizer, "<|pad|>")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    num_worked = round(BATCH * WORKED_SHARE)
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / seconds) < 1:
        lr = PEAK_LR * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Two forwards, so that the short guesses are not padded to the length of worked answers.
        parts = [
            pad([example(tokenizer, task, random.getrandbits(40), worked) for _ in range(num)], pad_id)
            for worked, num in ((True, num_worked), (False, BATCH - num_worked))
        ]
        count = sum(int((labels != -100).sum()) for _, labels in parts)
        total = 0.0
        for ids, labels in parts:
            logits = model(input_ids=ids.to(device)).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten().to(device), ignore_index=-100, reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 200 == 0:
            print(f"step {step}  {time.monotonic() - started:.0f} s  loss {total:.4f}  lr {lr:.1e}", flush=True)


def main(out: str, minutes: float = 15.0) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.to(device)  # type: ignore[arg-type]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    train(model, tokenizer, 60 * minutes, device)
    model.cpu().eval().save_pretrained(Path(out))
    tokenizer.save_pretrained(Path(out))


if __name__ == "__main__":
    main(sys.argv[1], *(float(value) for value in sys.argv[2:3]))
