"""
Qwen3-0.6B (LoRA) from Qwen3-8B in 4 bits on conversations: one family, one tokenizer, compared token by token.

    accelerate launch recipes/qwen3_small_from_large.py
    accelerate launch recipes/qwen3_small_from_large.py --method dskd --output_dir runs/qwen3_dskd
    accelerate launch recipes/qwen3_small_from_large.py --use_peft false --dtype float32 --learning_rate 5e-5 \
        --gradient_checkpointing true                           (all of the student: a 24 GB card)
    python recipes/qwen3_small_from_large.py --smoke            (tiny random models, a minute on a CPU, no network)

Any two Qwen3 models will do (`--teacher_model_name_or_path Qwen/Qwen3-14B`). Their embeddings may be padded to
different numbers of rows: the rows that both have are compared. Both models read the same conversation in Qwen's chat
template, with thinking neither asked for nor switched off.
"""

from pathlib import Path

from hf_dskd import run


def main() -> None:
    run.train(run.parse(__doc__, Path(__file__).with_suffix(".yaml")))


if __name__ == "__main__":
    run.command(main)
