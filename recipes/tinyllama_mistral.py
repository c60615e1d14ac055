"""
TinyLlama-1.1B (LoRA) from Mistral-7B in 4 bits on Dolly: the larger pair of the DSKD paper and its hyper-parameters.

    accelerate launch recipes/tinyllama_mistral.py
    accelerate launch recipes/tinyllama_mistral.py --teacher_cache runs/mistral_cache
    accelerate launch recipes/tinyllama_mistral.py --sft_teacher --sft_teacher_lora_r 256 --sft_teacher_epochs 10
    python recipes/tinyllama_mistral.py --smoke                 (tiny random models, a minute on a CPU, no network)

A card of 12 GB is enough (README.md, "Memory"), computed and not measured. The paper's teacher had been
fine-tuned on the same data with the adapter of the third command; that trains the 7B model in bfloat16, before it is
quantized, and takes a card of its size (from 40 GB).
"""

from pathlib import Path

from hf_dskd import run


def main() -> None:
    run.train(run.parse(__doc__, Path(__file__).with_suffix(".yaml")))


if __name__ == "__main__":
    run.command(main)
