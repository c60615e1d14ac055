"""
Any pair of models: two names, and everything else is derived from their configurations and tokenizers.

    accelerate launch recipes/your_pair.py HuggingFaceTB/SmolLM2-360M-Instruct Qwen/Qwen2.5-1.5B-Instruct
    accelerate launch recipes/your_pair.py STUDENT TEACHER --dataset_name my.jsonl --num_train_epochs 1
    python recipes/your_pair.py STUDENT TEACHER --dry_run > pair.yaml        (for hf-dskd train --config pair.yaml)
    python recipes/your_pair.py STUDENT TEACHER --smoke

--dry_run prints all settings and stops.
Names are those of the hub, of folders, or of packaged models. What is derived (length, method, adapter or all weights,
a teacher in 4 bits, batch size, prompts) is printed with its reason before anything is loaded; any setting of yours
wins, and the rest is fitted around it. Projectors need no file: they take their sizes from the two models. A run goes
on with `hf-dskd train --config OUTPUT_DIR/settings.yaml --resume_from_checkpoint last`, which derives nothing anew.
"""

from pathlib import Path

from hf_dskd import run
from hf_dskd.experiments import autoconfig


def main() -> None:
    autoconfig.train(__doc__, Path(__file__).with_suffix(".yaml"))


if __name__ == "__main__":
    run.command(main)
