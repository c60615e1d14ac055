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
    args = run.parse(__doc__, Path(__file__).with_suffix(".yaml"))
    train, held_out = run.load_data(args)
    teacher = args.options.teacher_model_name_or_path
    if args.options.sft_teacher:
        teacher = run.train_teacher(args, teacher, train)
    trainer = run.make_trainer(args, args.model.model_name_or_path, teacher, train, held_out)
    folder = run.distil(args, trainer)
    if trainer.is_world_process_zero():
        for path in [folder, *run.show(trainer, folder)]:
            print(path)


if __name__ == "__main__":
    run.command(main)
