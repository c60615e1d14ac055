"""
GPT-2 (124M) from Qwen1.5-1.8B on Dolly, to copy and change: data, settings, trainer, training, push.

    accelerate launch recipes/python/gpt2_qwen.py
    hf-dskd train --config recipes/gpt2_qwen.yaml        (the same run, with a report and every setting as a flag)
"""

from datasets import load_dataset

from hf_dskd import DSKDConfig, DSKDTrainer


def main() -> None:
    data = load_dataset("databricks/databricks-dolly-15k", split="train")
    data = data.rename_columns({"context": "input", "response": "output"}).train_test_split(500, seed=0)

    args = DSKDConfig(
        "runs/gpt2_qwen_python",
        method="dskd_cma_ga",
        divergence="skewed_forward_kl",
        kd_rate=0.5,
        kd_temperature=2.0,
        prompt_style="plain",  # both models see the paper's instruction template
        max_length=512,
        skip_long_prompts=True,
        dataset_num_proc=4,
        num_train_epochs=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        learning_rate=5e-4,
        projector_learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        seed=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_bits_per_byte",
        report_to="none",
        push_to_hub=False,  # True: token, rights and name are checked before anything is trained
        hub_model_id="gpt2-from-qwen",
    )
    student, teacher = "openai-community/gpt2", "Qwen/Qwen1.5-1.8B"
    trainer = DSKDTrainer(student, teacher, args, train_dataset=data["train"], eval_dataset=data["test"])

    trainer.train()
    trainer.save_model()
    print(trainer.evaluate())
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name="databricks/databricks-dolly-15k")


if __name__ == "__main__":
    main()
