"""
Llama-3.2-1B-Instruct with an adapter from Qwen2.5-7B-Instruct in 4 bits on Dolly, to copy and change.

    accelerate launch recipes/python/llama32_1b_qwen25_7b.py
    hf-dskd train --config recipes/llama32_1b_qwen25_7b.yaml        (the same run, with a report and flags)
"""

from datasets import load_dataset
from peft import LoraConfig

from hf_dskd import DSKDConfig, DSKDTrainer


def main() -> None:
    data = load_dataset("databricks/databricks-dolly-15k", split="train")
    data = data.rename_columns({"context": "input", "response": "output"}).train_test_split(500, seed=0)

    args = DSKDConfig(
        "runs/llama32_1b_qwen25_7b_python",
        method="dskd_cma_ga",
        prompt_style="chat",  # each model in its own template
        chat_template_kwargs={"date_string": "26 Jul 2024"},  # Llama's writes today's date otherwise
        max_length=512,
        skip_long_prompts=True,
        dataset_num_proc=4,
        load_teacher_in_4bit=True,
        model_init_kwargs={"dtype": "bfloat16"},  # of the frozen student; float16 on a T4
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        gradient_checkpointing=True,
        learning_rate=2e-4,
        projector_learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        seed=0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_bits_per_byte",
        report_to="none",
        push_to_hub=False,  # True: token, rights and name are checked before anything is trained
        hub_model_id="Llama-3.2-1B-from-Qwen2.5-7B",
    )
    adapter = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    student, teacher = "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
    trainer = DSKDTrainer(
        student, teacher, args, train_dataset=data["train"], eval_dataset=data["test"], peft_config=adapter
    )
    trainer.train()
    trainer.save_model()
    print(trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name="databricks/databricks-dolly-15k")


if __name__ == "__main__":
    main()
