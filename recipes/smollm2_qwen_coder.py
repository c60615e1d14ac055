"""
SmolLM2-135M from Qwen2.5-Coder-0.5B on Python functions: real models and real text without a model hub.

    accelerate launch recipes/smollm2_qwen_coder.py
    accelerate launch --multi_gpu --num_processes 2 recipes/smollm2_qwen_coder.py        (two processes, on CPUs too)
    python recipes/smollm2_qwen_coder.py --demo                                          (what `make demo` runs)

Both models come from pinned packages and are converted once. The text is the standard library's own source: signature
and docstring are the prompt, the body is the response. `--demo` trains twice, on the text alone and with
distillation, and compares: bits per byte of held-out functions, one generated function, and a report of each run.
"""

import gc
import sys
import time
from pathlib import Path


GPU_STEPS = 600


def main() -> None:
    from hf_dskd import run

    flags = [flag for flag in sys.argv[1:] if flag != "--demo"]
    args = run.parse(__doc__, Path(__file__).with_suffix(".yaml"), flags)

    if "--demo" in sys.argv:
        student = run.model_name(args.model.model_name_or_path)
        teacher = run.model_name(args.options.teacher_model_name_or_path)
        demo(args, student, teacher, *run.load_data(args))
    else:
        run.train(args)


def demo(args, student, teacher, train, held_out) -> None:
    """Trains on the text alone, then with distillation, on the same batches, and prints both beside the teacher."""
    import torch

    from hf_dskd import run
    from hf_dskd.evaluation import bits_per_byte, complete
    from hf_dskd.report import compare_runs

    start = time.perf_counter()
    if torch.cuda.is_available() and "--max_steps" not in sys.argv:
        print(f"A GPU is there: training {GPU_STEPS} steps instead of {args.config.max_steps}.")
        args.config.max_steps = GPU_STEPS
    folder = Path(args.config.output_dir)
    dtype = getattr(torch, args.config.training_dtype)
    dtype = None if dtype == torch.float32 else dtype
    steps, name = args.config.max_steps, args.config.method
    # The demo evaluates before and after; in between it only trains.
    # The teacher itself is evaluated too, so that it is loaded anyway.
    asked = run.variant(args.config, eval_strategy="no", save_strategy="no", teacher_cache=None)
    scores, written = {}, {}

    def measure(title, model, tokenizer, side="student"):
        scores[title] = bits_per_byte(model, rows, side=side, dtype=dtype, description=f"evaluating: {title}")
        write(title, model, tokenizer, "" if side == "student" else "teacher_")

    def write(title, model, tokenizer, prefix=""):
        prompt = sample[f"{prefix}input_ids"][: sample[f"{prefix}prompt_length"]]
        with torch.autocast(next(model.parameters()).device.type, dtype=dtype, enabled=dtype is not None):
            written[title] = complete(model, tokenizer, prompt)

    for method in ("sft", name):
        args.config = run.variant(asked, method=method, output_dir=str(folder / method))
        settings = run.changed_settings(args)
        trainer = run.make_trainer(args, student, teacher, train, held_out)
        run.write_yaml(folder / method / run.SETTINGS_NAME, settings)
        rows = trainer.eval_dataset
        # A short one, so that its text fits a screen.
        shortest = sorted(range(len(rows)), key=lambda index: len(rows[index]["byte_ends"]))
        sample = rows[shortest[len(shortest) // 4]]
        if method == "sft":
            measure("before", trainer.model, trainer.processing_class)
        else:
            measure("teacher", trainer.teacher.model, trainer.teacher_processing_class, side="teacher")
        print(f"\n{method}: {steps} steps of {args.options.total_batch_size} functions")
        run.distil(args, trainer)
        scores[method] = trainer.state.log_history[-1]["eval_bits_per_byte"]
        write(method, trainer.model, trainer.processing_class)
        report = run.show(trainer, folder / method)[-1]
        tokenizer = trainer.processing_class
        del trainer
        gc.collect()
    together = compare_runs([folder / "sft", folder / name], folder / "report")

    titles = ["before", "sft", name, "teacher"]
    print(f"\n{len(held_out)} held-out functions, {steps} steps, seed {args.config.seed}")
    print("".join(f"{title:>16}" for title in ["", *titles]))
    print("".join([f"{'bits per byte':>16}", *(f"{scores[title]:16.4f}" for title in titles)]))
    print(f"\nThe prompt:\n\n{tokenizer.decode(sample['input_ids'][: sample['prompt_length']])}")
    for title in titles:
        print(f"--- {title}\n{written[title].rstrip()}\n")
    gain, beyond = scores["before"] - scores[name], scores["sft"] - scores[name]
    print(f"{name} took {gain:.4f} bits per byte off the student; that is {abs(beyond):.4f}", end=" ")
    print("more than training on the text alone." if beyond > 0 else "less than training on the text alone.")
    if beyond <= 0:
        print("Why, and what was tried: recipes/README.md.")
    print(f"\nstudent    {folder / name}\nreport     {report}\nboth runs  {together}")
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    from hf_dskd.launch import command

    command(main)
