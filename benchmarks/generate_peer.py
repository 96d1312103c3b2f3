"""What a user would pick instead to generate text: transformers' `generate` with its KV cache, greedy, on the CPU.

`make peers` installs what this needs. One JSON line a run on standard output; run 0 is the warm-up.

    .venv-peers/bin/python benchmarks/generate_peer.py --model DIR --examples FILE --batch 8 --new 64 --rounds 3

The file is that of `peft_peer.py`; the prompts of its first `--batch` examples are continued, padded on the left. Every
row gets exactly `--new` tokens. Keys: `round_s` is the run by the wall clock, `tokens` all new tokens.
"""

import argparse
import json
import time
from collections.abc import Sequence

import torch
from peft_loop import read_examples
from transformers import AutoModelForCausalLM


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--examples", required=True, help="JSON lines of examples")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--new", type=int, default=64, help="tokens for each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="including the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L] that all end in the last column, and the mask [B, L] of what is no padding."""
    length = max(map(len, prompts))
    tokens = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :], mask[row, length - len(prompt) :] = torch.tensor(prompt), 1
    return tokens, mask


def main(arguments: Sequence[str] | None = None) -> None:
    """Times the runs."""
    chosen = parse_arguments(arguments)
    torch.set_num_threads(chosen.threads)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    examples = [example for client in read_examples(chosen.examples) for example in client][: chosen.batch]
    tokens, mask = left_padded([example.tokens[: example.prompt] for example in examples])
    length = {"min_new_tokens": chosen.new, "max_new_tokens": chosen.new}
    for number in range(chosen.rounds):
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(input_ids=tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
        seconds, new = time.perf_counter() - start, len(examples) * (made.shape[1] - tokens.shape[1])
        line = {"peer": "generate", "round": number, "round_s": round(seconds, 3), "tokens": new}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
