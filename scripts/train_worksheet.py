"""Train the adapter of ``fasa eval worksheet`` on one GPU, and say how often it is right.

python scripts/train_worksheet.py --minutes 20 --out worksheet.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fasa_sglang.workloads.eval.worksheet.held_out import held_out_accuracy
from fasa_sglang.workloads.eval.worksheet.training import Training, train
from fasa_sglang.workloads.models.lora import fold
from fasa_sglang.workloads.models.packaged import base_identity, packaged_model
from fasa_sglang.workloads.models.pretrained import load_causal_lm, load_tokenizer

MAX_BYTES = 10_000_000


def main() -> None:
    """Train, then measure the merged model on held-out programs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen-coder", help="a packaged model")
    parser.add_argument("--out", type=Path, required=True, help="adapter; continued if it exists")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--save-minutes", type=float, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=Training.lengths)
    parser.add_argument("--batch-tokens", type=int, default=Training.batch_tokens)
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--attention-rank", type=int, default=Training.attention_rank)
    parser.add_argument("--mlp-rank", type=int, default=Training.mlp_rank)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--held-out", type=int, default=20, help="programs of each length")
    options = vars(parser.parse_args())
    model_name, held_out = options.pop("model"), options.pop("held_out")
    training = Training(adapter=options.pop("out"), base=base_identity(model_name), **options)
    folder = str(packaged_model(model_name))
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(folder, device, torch.bfloat16)
    fold(model, train(model, tokenizer, training))
    size = training.adapter.stat().st_size
    print(f"{training.adapter}: {size / 1e6:.2f} MB")
    if size > MAX_BYTES:
        print(f"larger than {MAX_BYTES / 1e6:.0f} MB; train with smaller ranks")
    for reply_len in training.lengths:
        shares = held_out_accuracy(model, tokenizer, reply_len, held_out)
        text = ", ".join(f"{name} {share:.5f}" for name, share in shares.items())
        print(f"right in replies of {reply_len} tokens: {text}")


if __name__ == "__main__":
    main()
