"""
GPT-2 (124M) from Qwen1.5-1.8B on Dolly: the pair and the hyper-parameters of the DSKD-CMA-GA paper.

    accelerate launch recipes/gpt2_qwen.py
    accelerate launch recipes/gpt2_qwen.py --sft_teacher --push_to_hub
    accelerate launch recipes/gpt2_qwen.py --method dskd_cma --load_teacher_in_4bit --seed 1

The paper's teacher had been fine-tuned on the same data: `--sft_teacher` does that first.
"""

from pathlib import Path

from hf_dskd import run


def main() -> None:
    run.train(run.parse(__doc__, Path(__file__).with_suffix(".yaml")))


if __name__ == "__main__":
    run.command(main)
