"""transformers' own generate, a process of its own: ``python -m tests.bench.generate MODEL THREADS``."""

import sys
import time
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tests.bench.generate_messages import Generate, Generated


def _generate(model: Any, command: Generate) -> Generated:
    prompt = torch.tensor(command.prompts)
    kind = {"cache_implementation": command.cache} if command.cache else {}
    began_s = time.monotonic()
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=command.max_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **kind,
    )
    took_s = time.monotonic() - began_s
    return Generated(tokens=output.numel() - prompt.numel(), took_s=took_s)


def main() -> None:
    """Obey until standard input ends."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    decode = msgspec.json.Decoder(Generate).decode
    for line in sys.stdin.buffer:
        with torch.inference_mode():
            answer = _generate(model, decode(line))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
