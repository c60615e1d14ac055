"""
Llama-3.2-1B-Instruct (LoRA) from Qwen2.5-7B-Instruct in 4 bits on Dolly: two current families, each in its own chat
template.

    hf auth login
    accelerate launch recipes/llama32_1b_qwen25_7b.py
    accelerate launch recipes/llama32_1b_qwen25_7b.py --teacher_cache runs/qwen25_cache --method alm
    python recipes/llama32_1b_qwen25_7b.py --smoke              (tiny random models, a minute on a CPU, no network)

The student is gated: accept the Llama 3.2 Community License at https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct,
wait for the mail that grants access, and log in with a token that may read gated repositories. That licence asks that
what you publish has a name beginning with "Llama" and says "Built with Llama". The smoke run needs none of this.
A 16 GB card is enough (README.md, "Memory"), one of 12 GB with `--teacher_cache`.
"""

from pathlib import Path

from hf_dskd import run


def main() -> None:
    run.train(run.parse(__doc__, Path(__file__).with_suffix(".yaml")))


if __name__ == "__main__":
    run.command(main)
